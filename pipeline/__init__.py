"""The machinery of the stages; it knows none of them."""

import os

# OpenCV reads it once, when it is first imported: stored crops are decoded without another look at their header.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "100000000")
