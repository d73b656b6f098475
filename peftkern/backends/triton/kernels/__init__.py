"""The three kernel bodies, their plugs, and the helpers both share. Only ``launch.py`` imports the bodies."""
