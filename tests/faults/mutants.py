"""The lines that mutations.py breaks, one at a time: each has a text that stands in its file once, and another that is
plausible and wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in ``file`` (of the package); with ``new`` in its place ``why`` goes wrong, and ``tests``
    should say so."""

    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


BASIS, BASES = ("test_basis.py",), ("test_bases.py", "test_basis.py")
PROJECTION = ("test_projection.py",)
CONV = ("test_conv.py",)
PLAN = ("test_plan.py",)
VERIFY = ("test_verify.py",)
REFIT = ("test_calibration.py",)
HOLDING = ("test_holding.py",)
SEARCH = ("test_frequencies.py",)
KNAPSACK = ("test_budget.py",)
LAYOUT = ("test_layout.py",)

MUTANTS = (
    Mutant(
        "kernels/basis.py", "vectors[0] = math.sqrt(1 / size)", "vectors[0] = math.sqrt(2 / size)",
        "the constant vector is of norm sqrt 2", BASIS,
    ),
    Mutant(
        "kernels/basis.py", "* (position + 0.5) * frequency)", "* position * frequency)",
        "samples of another cosine transform", BASIS,
    ),
    Mutant(
        "kernels/basis.py", "*map(range, kernel_size)), key=lambda f: (sum(f), f)))",
        "*map(range, kernel_size)), key=lambda f: (sum(f), f[::-1])))",
        "u and v are swapped within a level", BASIS,
    ),
    Mutant("kernels/basis.py", "if sum(f) < levels)", "if sum(f) <= levels)", "lambda keeps a level too many", BASIS),
    Mutant(
        "kernels/basis.py", "math.ceil(lam * max(kernel_size) / 3)", "math.ceil(lam * min(kernel_size) / 3)",
        "1x7 is taken for a kernel of one", BASIS,
    ),
    Mutant(
        "kernels/basis.py", "(vectors_FK[:, :, None] * vectors[index[:, axis]][:, None, :])",
        "(vectors_FK[:, None, :] * vectors[index[:, axis]][:, :, None])",
        "kernels come out transposed", BASIS,
    ),
    Mutant(
        "kernels/basis.py", "vectors_FK.abs().sum(1, keepdim=True)", "vectors_FK.abs().sum(0, keepdim=True)",
        "l1 norms along the wrong axis", (*BASIS, *PROJECTION),
    ),
    Mutant(
        "kernels/basis.py", "-math.sqrt(left / (right", "math.sqrt(left / (right",
        "Haar wavelets that do not change their sign", BASES,
    ),
    Mutant(
        "kernels/basis.py", "(position / (size / 4))", "(position / (size / 2))", "a Gaussian twice as wide", BASES,
    ),
    Mutant("kernels/basis.py", "[1].flip(1).T", "[1].T", "the weakest eigenvectors come first", BASES),
    Mutant(
        "kernels/basis.py", "all(0 <= i < k for", "all(0 <= i <= k for", "a frequency next to the kernel passes",
        (*BASIS, *PLAN),
    ),
    Mutant(
        "kernels/projection.py", "(basis_FK / basis_FK.square().sum(1, keepdim=True)).T", "basis_FK.T",
        "a basis that is not of unit norm is projected on as if it were", PROJECTION,
    ),
    Mutant(
        "kernels/projection.py", "rows.to(torch.float64) @ matrix_AB", "rows @ matrix_AB.to(rows.dtype)",
        "projection and reconstruction in the dtype of the weights", (*PROJECTION, "test_convert.py"),
    ),
    Mutant(
        "kernels/projection.py", "_norm(approximation - kernel), _norm(kernel)",
        "_norm(approximation - kernel), _norm(approximation)",
        "an error relative to the wrong one of two", PROJECTION,
    ),
    Mutant(
        "kernels/projection.py", "return kept / total if total > 0 else 1.0", "return kept / total if total > 0 else 0.0",
        "a kernel of zeros is said to lose all", PROJECTION,
    ),
    Mutant(
        "layers/harmonic.py", "dtype = torch.promote_types(coefficients.dtype, torch.float32)", "dtype = coefficients.dtype",
        "half-precision kernels are merged in half precision", CONV,
    ),
    Mutant(
        "layers/harmonic.py", "torch.autocast(device, enabled=False)", "torch.autocast(device)",
        "kernels are merged in autocast's precision", CONV,
    ),
    Mutant(
        "layers/harmonic.py", "kernel_OKI.unflatten(1, kernel_size)", "kernel_OKI.unflatten(1, kernel_size[::-1])",
        "height and width are swapped where kernels are laid out channels_last", CONV,
    ),
    Mutant(
        "layers/harmonic.py", "requires_grad=parameter.requires_grad)", "requires_grad=True)",
        "frozen kernels thaw", CONV,
    ),
    Mutant(
        "layers/harmonic.py", "hash((\"weight\", id(harmonic.coefficients), harmonic.frequencies, harmonic.family))",
        "hash((\"weight\", harmonic.frequencies, harmonic.family))",
        "different kernels are taken for tied ones", (*CONV, "test_forms.py"),
    ),
    Mutant(
        "plan/plan.py", "levels = sum(self.frequencies[-1]) + 1", "levels = sum(self.frequencies[-1])",
        "a plan tells a lambda too small", PLAN,
    ),
    Mutant(
        "plan/plan.py", "zip(sizes, (2, 3), strict=False)", "zip(sizes, (3, 2), strict=False)",
        "progressive cuts the smallest maps less than the next", PLAN,
    ),
    Mutant(
        "plan/plan.py", "lam_by_size.get(prod(site.output_size))", "lam_by_size.get(max(site.output_size))",
        "maps are looked up by their longer side", PLAN,
    ),
    Mutant(
        "plan/plan.py", "union.setdefault(tie[layer.name], set()).update(layer.frequencies)",
        "union[tie[layer.name]] = set(layer.frequencies)",
        "of tied layers the last decides", (*PLAN, "test_convert.py"),
    ),
    Mutant(
        "plan/plan.py", "kept = [site for site in chosen if tie[site.name] not in torn]", "kept = list(chosen)",
        "one of two tied layers is converted alone", PLAN,
    ),
    Mutant(
        "plan/plan.py", "levels_by_name.update(dict.fromkeys(matches, levels))",
        "levels_by_name = dict.fromkeys(matches, levels) | levels_by_name",
        "the first pattern decides, not the last", PLAN,
    ),
    Mutant(
        "plan/plan.py", "if layer.kernel_size != site.kernel_size:",
        "if prod(layer.kernel_size) != prod(site.kernel_size):",
        "a plan of 1x9 kernels fits 3x3 ones", PLAN,
    ),
    Mutant(
        "network/copying.py", "new.cell_contents = self._like(value.cell_contents)", "new.cell_contents = value.cell_contents",
        "a copy's functions work on the original", ("test_copying.py",),
    ),
    Mutant(
        "pipeline/verify.py", "for name in found.outputs if name not in ran]", "for name in found.outputs if not name]",
        "what only the original runs is not told", ("test_copying.py",),
    ),
    Mutant(
        "plan/cost.py", "if not layer.whole and type(conv) in FACTORABLE:", "if not layer.whole:",
        "a layer without a factored form saves MACs", ("test_convert.py",),
    ),
    Mutant("plan/plan.py", "site.fixed or site.depthwise):", "site.fixed):", "depthwise layers are not spared", PLAN),
    Mutant(
        "pipeline/kernel_check.py", "info.eps * planned.abs() + floor", "info.eps * planned.abs().max() + floor",
        "small coefficients may be wrong by as much as large ones", VERIFY,
    ),
    Mutant(
        "pipeline/kernel_check.py", "floor = largest * exact[0, 0].numel() * FLOAT64_PRODUCTS", "floor = largest * 1e-2",
        "coefficients may be wrong by a hundredth", VERIFY,
    ),
    Mutant(
        "pipeline/kernel_check.py", "energy_kept(kernel, best_FK) - 1e-6", "energy_kept(kernel, best_FK) - 1.0",
        "another layer's basis passes for this one's", BASES,
    ),
    Mutant(
        "pipeline/structure_check.py", "(\"stride\", \"padding\", \"dilation\", ", "(\"stride\", \"padding\", ",
        "dilation is not compared", VERIFY,
    ),
    Mutant(
        "pipeline/structure_check.py", "not _equal(tensor, theirs[key])", "not torch.allclose(tensor, theirs[key])",
        "what was not to change may change a little", VERIFY,
    ),
    Mutant(
        "pipeline/verify.py", "if isnan(error)), max(measured))", "if isnan(error)), min(measured))",
        "the better of two errors is the verdict", VERIFY,
    ),
    Mutant(
        "pipeline/structure_check.py", "found.get(key) == sha256", "bool(sha256)",
        "whatever calibration may have written passes", (*VERIFY, *REFIT),
    ),
    Mutant(
        "pipeline/verify.py", "not problems and agreement in (None, 1.0)", "not problems",
        "another top-1 class passes", VERIFY,
    ),
    Mutant(
        "network/comparison.py",
        "if not torch.equal(found[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5)):",
        "if not torch.equal(found[~finite], found[~finite]):",
        "outputs that became infinite pass where the original's are NaN", VERIFY,
    ),
    Mutant("search/knapsack.py", "side=\"right\"", "side=\"left\"", "a plan that just fits is left out", KNAPSACK),
    Mutant(
        "search/knapsack.py", "scores[order][1:] < best[:-1]", "scores[order][1:] <= best[:-1]",
        "dearer plans of the same score are kept", KNAPSACK,
    ),
    Mutant(
        "search/knapsack.py", "np.lexsort((scores, costs))", "np.lexsort((costs, scores))",
        "trade-offs are sorted by score, not by cost", KNAPSACK,
    ),
    Mutant("search/knapsack.py", "    last[0] = True\n", "", "the cheapest of all is thinned out", KNAPSACK),
    Mutant(
        "search/elimination.py", "gain_GIR, alpha=-1)", "gain_GIR, alpha=1)",
        "the Schur complement with the wrong sign", SEARCH,
    ),
    Mutant(
        "search/elimination.py", "view(channels, frequencies).T.flatten()", "view(channels, frequencies).flatten()",
        "channels are eliminated in the place of frequencies", SEARCH,
    ),
    Mutant(
        "search/choices.py", "order[count - size :]", "order[:size]", "what should go first is what stays", SEARCH,
    ),
    Mutant(
        "calibration/moments.py", "    power += damping * scale_G1\n", "", "moments without a ridge", SEARCH,
    ),
    Mutant(
        "calibration/solvers.py", "1 / (values_GN + damping * scale_G1)", "1 / values_GN",
        "normal equations without a ridge", REFIT,
    ),
    Mutant(
        "calibration/solvers.py", "residual_GO - (change_GON @ self.sum_GN", "residual_GO + (change_GON @ self.sum_GN",
        "the bias adds what it should take away", REFIT,
    ),
    Mutant(
        "calibration/solvers.py", "- 2 * (D * self.cross_GON).sum()", "- (D * self.cross_GON).sum()",
        "the error after a change counts half of the gain", REFIT,
    ),
    Mutant(
        "calibration/solvers.py",
        "            cross = cross - residual_GO[..., None] * self.sum_GN[:, None] / self.count\n",
        "            pass\n", "the right-hand side is not centred", REFIT,
    ),
    Mutant(
        "calibration/solvers.py", "values_GR.clamp_min(0).sum(1, keepdim=True) / self.layer.unknowns",
        "values_GR.clamp_min(0).mean(1, keepdim=True)", "the dual damps by another scale", REFIT,
    ),
    Mutant(
        "calibration/solvers.py", "kernel=image.kernel + strength * x.kernel", "kernel=image.kernel",
        "conjugate gradients without a ridge", REFIT,
    ),
    Mutant(
        "calibration/equations.py", "au - a * u / self.count", "au",
        "the best factor is that of what is not centred", REFIT,
    ),
    Mutant(
        "calibration/equations.py", "(rows @ self.direction)[..., None] * self.direction",
        "(rows @ self.direction)[..., None] / self.unknowns",
        "weight standardisation takes a mean away that is none", REFIT,
    ),
    Mutant(
        "calibration/responses.py", ".flip(*range(1, len(kernel_size) + 1)).flatten(1)", ".flatten(1)",
        "transposed convolutions are not turned round", REFIT,
    ),
    Mutant(
        "calibration/responses.py", "for pair in reversed(edges) for edge in pair]",
        "for pair in edges for edge in pair]",
        "paddings of height and width are swapped", REFIT,
    ),
    Mutant(
        "calibration/responses.py", "edges.append((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2))",
        "edges.append((d * (k - 1) - d * (k - 1) // 2, d * (k - 1) // 2))",
        "even kernels are padded on the wrong side", REFIT,
    ),
    Mutant(
        "calibration/responses.py", "dtype=torch.long)[:, None] * wanted", "dtype=torch.long)[:, None]",
        "examples share most of their positions", REFIT,
    ),
    Mutant(
        "calibration/responses.py", "return (blocks.transpose(1, 2) if transposed else blocks).flatten(2)",
        "return blocks.flatten(2)", "channels in and out of transposed convolutions are mixed up", REFIT,
    ),
    Mutant(
        "calibration/layers.py", "self.gain.div_(scale", "self.gain.mul_(scale",
        "gains are scaled the wrong way", REFIT,
    ),
    Mutant(
        "calibration/layers.py", "error < best.error_after -", "error < before -",
        "the last that is better than nothing is taken, not the best", REFIT,
    ),
    Mutant(
        "calibration/refit.py", "if damping >= least)", "if damping <= least)",
        "starved fits are believed the most", REFIT,
    ),
    Mutant(
        "calibration/batch_norm.py", ".clamp_min(0) / (count - 1)", ".clamp_min(0) / count",
        "running variances are biased", REFIT,
    ),
    Mutant(
        "calibration/batch_norm.py", "mean.new_ones(1)]).cpu() * len(x)", "mean.new_ones(1)]).cpu()",
        "a small last batch counts as much as a whole one", REFIT,
    ),
    Mutant(
        "calibration/holding.py", "if self.always_again or _version(layer) != version:", "if self.always_again:",
        "a held run goes on with what the layer answered before its refit", HOLDING,
    ),
    Mutant(
        "calibration/holding.py", "name not in run.passed and run.valid:", "name not in run.passed:",
        "a held run goes on though what it passed changed", HOLDING,
    ),
    Mutant(
        "calibration/holding.py", " fed(run.at, run.shown) != next(expected, None):", " not next(expected, None):",
        "networks that runs in turns mix up are run in turns", HOLDING,
    ),
    Mutant(
        "calibration/divergence.py", "p.exp() * (p - q)", "q.exp() * (q - p)", "the divergence is that of the reverse",
        REFIT,
    ),
    Mutant(
        "calibration/__init__.py", "targets = Targets(original, sites", "targets = Targets(converted, sites",
        "layers are fitted to what the cut network answers", REFIT,
    ),
    Mutant(
        "calibration/__init__.py", "refit is not None and refit <= plain", "refit is not None and refit >= plain",
        "a refit that makes the outputs worse is taken", REFIT,
    ),
    Mutant(
        "calibration/__init__.py", "before[key] + share * (after", "before[key] - share * (after",
        "half of a change is taken backwards", REFIT,
    ),
    Mutant(
        "network/comparison.py", "(found, expected) <= rounding", "(found, expected) >= 0",
        "networks that misread another layout are calibrated in it", LAYOUT,
    ),
)  # fmt: skip
