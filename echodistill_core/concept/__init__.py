"""The concept: the photographs, what they show, the word that will mean it, and the captions it is taught with."""
