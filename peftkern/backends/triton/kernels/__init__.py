"""The bodies (fused, shrink, grad and its reduce), their plugs, and what they share. Only ``launch`` imports bodies."""
