"""The sending end of hand-offs: `outgoing` holds the rules of one, `sender` carries them out."""
