"""Laws: scores, noise, and soft values."""
