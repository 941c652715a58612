"""The error where the original projects assert."""


class RuleError(ValueError, AssertionError):
    """A rule of the original project is broken; code that expects its AssertionError catches it too."""
