"""The evaluations of the paper: matching, pose, reconstruction, localisation, edges."""
