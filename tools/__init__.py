"""What makes files of the pack that nobody should write by hand."""
