"""Model families: teacher, student, shared text encoder and VAE; reading them from folders, files and the hub cache."""
