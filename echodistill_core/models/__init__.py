"""Model families: what a teacher, a student and what they share are made of, and where they come from."""
