"""Networks, built at any size from a configuration. They read no file and no environment."""
