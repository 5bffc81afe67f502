"""The first command for new users: personalise the embedded family, and show the result on an HTML page."""
