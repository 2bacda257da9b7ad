"""The SEV lab: a real kernel and a real kvm-amd on a machine without SEV. See README.md beside this package."""
