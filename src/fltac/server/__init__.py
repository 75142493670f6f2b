"""What the coordinator does with anonymous uploads: check, group, keep identities, average."""
