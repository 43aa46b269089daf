"""Motion: skeletons, tracks, cameras and the drawing of poses."""
