"""The packed n-bit model file: bit packing, layout, reading, writing, sizes."""
