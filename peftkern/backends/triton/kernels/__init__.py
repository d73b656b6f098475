"""The three kernel bodies, their plugs, and the helpers both share. Only ``launch`` imports the bodies."""
