"""Mean, covariance and principal components of feature vectors, computed in batches."""

import torch


class Moments:
    """Mean and covariance of feature vectors, accumulated in float64 on the CPU."""

    def __init__(self):
        self.n, self.total, self.squares = 0, 0.0, 0.0

    def add(self, features):
        """Add a batch of features (b, d)."""
        f = features.double().cpu()
        self.n += len(f)
        self.total = self.total + f.sum(0)
        self.squares = self.squares + f.T @ f

    def mean(self):
        """Return the mean, (d,)."""
        return self.total / self.n

    def covariance(self):
        """Return the unbiased covariance, (d, d). Needs at least two vectors."""
        mean = self.mean()
        return (self.squares - self.n * torch.outer(mean, mean)) / (self.n - 1)

    def principal_components(self, count):
        """Compute the `count` directions of largest variance.

        Returns:
            The mean (d,); orthonormal components (count, d) in order of decreasing variance, each
            with a positive entry of largest magnitude; and the fraction of the total variance that
            they explain.
        """
        variances, vectors = torch.linalg.eigh(self.covariance())  # ascending
        components = vectors.flip(1)[:, :count].T  # (count, d)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        share = (variances.flip(0)[:count].sum() / variances.sum()).item()
        return self.mean(), components * largest.sign(), share
