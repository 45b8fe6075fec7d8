"""From MaskCLIP to plain CLIP and to open_clip, and back."""
