"""The receiving end of hand-offs: `intake` holds the rules of all, `receiver` carries them out."""
