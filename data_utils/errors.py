class UserError(ValueError):
    """Something a user can put right: shown as one message, without a traceback."""


class DatasetError(UserError):
    """A dataset that cannot be trained on. The message names file, dataset, frame, what was expected and found."""
