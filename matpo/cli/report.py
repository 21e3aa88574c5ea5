"""What `matpo run` says at the end."""
