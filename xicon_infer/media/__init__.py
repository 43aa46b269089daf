"""Image and video in and out (PyAV, Pillow, NumPy). Never imports torch."""
