# The units of `sevhop install`, with another command, and with the manual page, which only packages have.
/^# Installed by/d
/^Description=/aDocumentation=man:sevhop(1)
s,^ExecStart=@PYTHON@ -m sevhop.cli,ExecStart=/usr/bin/sevhop,
