"""Image-text pairs: where they come from, how they are decoded, and the embedded data set of drawn scenes."""
