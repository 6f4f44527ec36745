"""Where training pairs come from: MegaDepth, COLMAP models, rendered scenes."""
