"""What can go wrong with the lab itself, as opposed to the command that runs in it."""


class LabError(Exception):
    """The lab could not be made, did not come up, or died.

    :param reason: what happened, one line.
    :param detail: output of the tool or machine that failed; its last lines are kept.
    """

    LINES = 60

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = "\n".join(detail.strip().splitlines()[-self.LINES :])


class LabTimeout(LabError):
    """The time limit was reached; the machine has been ended."""
