def attention_with_kvcache(*args, **kwargs):
    raise NotImplementedError
