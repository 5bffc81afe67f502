"""The concept: reading photographs, training images, captions and augmentation."""
