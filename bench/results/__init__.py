"""Print, store, draw, publish and compare runs. The folders hold the committed runs by machine."""
