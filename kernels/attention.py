def attention(*args, **kwargs):
    raise NotImplementedError
