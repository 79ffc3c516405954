from standin import strict


class InterruptedException(BaseException):
    pass


strict(__name__)
