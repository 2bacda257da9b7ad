"""An AMD processor with SEV and SEV-ES, and its security processor, as changes to QEMU's TCG. See README.md."""
