"""The one exception that a user's mistake raises."""


class CTError(ValueError):
    """A user's mistake, told in one sentence: what is wrong and what to do about it."""
