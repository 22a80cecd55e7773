def linear(*args, **kwargs):
    raise NotImplementedError
