import torch
from standin import strict


class ForgeOperations:
    class Linear(torch.nn.Module):
        """No subclass of nn.Linear; casts its weight to what its input is in, and applies the scale of scaled fp8."""

        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.weight, self.bias, self.scale_weight = linear.weight, linear.bias, None

        def forward(self, x):
            weight, bias = (None if each is None else each.to(x.dtype) for each in (self.weight, self.bias))
            if self.scale_weight is not None:
                weight = weight * self.scale_weight.to(weight.dtype)
            return torch.nn.functional.linear(x, weight, bias)


strict(__name__)
