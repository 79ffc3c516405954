import threading

queue_lock = threading.Lock()  # the webui's FIFOLock is one that is fair
