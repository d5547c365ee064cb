"""What is in deploy/: checked, and run as far as that goes without a cluster or a cloud."""
