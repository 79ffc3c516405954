saved = []


def save_image(image, path, basename, seed, prompt, extension, *, info=None, p=None, suffix=""):
    saved.append((image, path, seed, prompt, extension, info, suffix))
