"""The mutants of mutations.py: each replaces one expression by another one that is plausible but wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A change that the tests must detect.

    ``place`` is a function or a constant of the package (see places.py), which has the expression or statement ``old``
    exactly once. ``why`` is the error if ``new`` replaces it; then one of ``tests`` must fail.
    """

    place: str
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
VECTORS = ("test_vectors.py",)
OTHER_LAYERS = ("test_coding_other_layers.py",)

MUTANTS = (
    Mutant(
        "kernels.basis.dct_vectors",
        "vectors[0] = math.sqrt(1 / size)",
        "vectors[0] = math.sqrt(2 / size)",
        "the constant vector is of norm sqrt 2", BASIS,
    ),
    Mutant(
        "kernels.basis.dct_vectors",
        "torch.cos(math.pi / size * (position + 0.5) * frequency)",
        "torch.cos(math.pi / size * position * frequency)",
        "samples of another cosine transform", BASIS,
    ),
    Mutant(
        "kernels.basis._all_frequencies",
        "tuple(sorted(itertools.product(*map(range, kernel_size)), key=lambda f: (sum(f), f)))",
        "tuple(sorted(itertools.product(*map(range, kernel_size)), key=lambda f: (sum(f), f[::-1])))",
        "u and v are swapped within a level", BASIS,
    ),
    Mutant(
        "kernels.basis.frequencies_below",
        "(f for f in all_frequencies(kernel_size) if sum(f) < levels)",
        "(f for f in all_frequencies(kernel_size) if sum(f) <= levels)",
        "lambda keeps a level too many", BASIS,
    ),
    Mutant(
        "kernels.basis.scaled_levels",
        "math.ceil(lam * max(kernel_size) / 3)",
        "math.ceil(lam * min(kernel_size) / 3)",
        "1x7 is taken for a kernel of one", BASIS,
    ),
    Mutant(
        "kernels.basis._outer_products",
        "vectors_FK[:, :, None] * vectors[index[:, axis]][:, None, :]",
        "vectors_FK[:, None, :] * vectors[index[:, axis]][:, :, None]",
        "kernels come out transposed", BASIS,
    ),
    Mutant(
        "kernels.basis.Basis._normalized",
        "vectors_FK.abs().sum(1, keepdim=True)",
        "vectors_FK.abs().sum(0, keepdim=True)",
        "l1 norms along the wrong axis", (*BASIS, *PROJECTION),
    ),
    Mutant(
        "kernels.basis.haar_vectors",
        "-math.sqrt(left / (right * (left + right)))",
        "math.sqrt(left / (right * (left + right)))",
        "Haar wavelets that do not change their sign", BASES,
    ),
    Mutant(
        "kernels.basis.gaussian_vectors",
        "(position / (size / 4)) ** 2",
        "(position / (size / 2)) ** 2",
        "a Gaussian twice as wide", BASES,
    ),
    Mutant(
        "kernels.basis.klt_vectors",
        "torch.linalg.eigh(filters_NK.T @ filters_NK)[1].flip(1).T",
        "torch.linalg.eigh(filters_NK.T @ filters_NK)[1].T",
        "the weakest eigenvectors come first", BASES,
    ),
    Mutant(
        "kernels.basis.check_frequencies",
        "all((0 <= i < k for i, k in zip(f, kernel_size, strict=True)))",
        "all((0 <= i <= k for i, k in zip(f, kernel_size, strict=True)))",
        "a frequency next to the kernel passes", (*BASIS, *PLAN),
    ),
    Mutant(
        "kernels.projection.project",
        "(basis_FK / basis_FK.square().sum(1, keepdim=True)).T",
        "basis_FK.T",
        "a basis that is not of unit norm is projected on as if it were", PROJECTION,
    ),
    Mutant(
        "kernels.projection._product_in_float64",
        "rows.to(torch.float64) @ matrix_AB",
        "rows @ matrix_AB.to(rows.dtype)",
        "projection and reconstruction in the dtype of the weights", (*PROJECTION, "test_convert.py"),
    ),
    Mutant(
        "kernels.projection.relative_error",
        "(_frobenius_norm(approximation - kernel), _frobenius_norm(kernel))",
        "(_frobenius_norm(approximation - kernel), _frobenius_norm(approximation))",
        "an error relative to the wrong one of two", PROJECTION,
    ),
    Mutant(
        "kernels.projection.energy_kept",
        "return kept / total if total > 0 else 1.0",
        "return kept / total if total > 0 else 0.0",
        "a kernel of zeros is said to lose all", PROJECTION,
    ),
    Mutant(
        "layers.harmonic._merged_kernel",
        "dtype = torch.promote_types(coefficients.dtype, torch.float32)",
        "dtype = coefficients.dtype",
        "half-precision kernels are merged in half precision", CONV,
    ),
    Mutant(
        "layers.harmonic.without_autocast",
        "torch.autocast(device, enabled=False)",
        "torch.autocast(device)",
        "kernels are merged in autocast's precision", CONV,
    ),
    Mutant(
        "layers.harmonic._merged_kernel",
        "kernel_OKI.unflatten(1, kernel_size)",
        "kernel_OKI.unflatten(1, kernel_size[::-1])",
        "height and width are swapped where kernels are laid out channels_last", CONV,
    ),
    Mutant(
        "layers.harmonic.parameter_like",
        "parameter.requires_grad",
        "True",
        "frozen kernels thaw", CONV,
    ),
    Mutant(
        "layers.harmonic.to_dense",
        "hash(('weight', id(harmonic.coefficients), harmonic.frequencies, harmonic.basis_spec))",
        "hash(('weight', harmonic.frequencies, harmonic.basis_spec))",
        "different kernels are taken for tied ones", (*CONV, "test_forms.py"),
    ),
    Mutant(
        "plan.space.frequencies.Frequencies.levels",
        "levels = sum(self.frequencies[-1]) + 1",
        "levels = sum(self.frequencies[-1])",
        "a plan tells a lambda too small", PLAN,
    ),
    Mutant(
        "plan.space.policies._progressive",
        "zip(sizes, (2, 3), strict=False)",
        "zip(sizes, (3, 2), strict=False)",
        "progressive cuts the smallest maps less than the next", PLAN,
    ),
    Mutant(
        "plan.space.policies._progressive",
        "lam_by_size.get(prod(layer.output_size))",
        "lam_by_size.get(max(layer.output_size))",
        "maps are looked up by their longer side", PLAN,
    ),
    Mutant(
        "plan.space.axis.SpaceAxis.shared",
        "{frequency for one in own for frequency in one.frequencies}",
        "{frequency for one in own[-1:] for frequency in one.frequencies}",
        "of tied layers the last decides", (*PLAN, "test_convert.py"),
    ),
    Mutant(
        "plan.making._skip_with_tied_layers",
        "kept = [layer for layer in chosen if tie[layer.name] not in skipped_by_tie]",
        "kept = list(chosen)",
        "one of two tied layers is converted alone", PLAN,
    ),
    Mutant(
        "plan.space.policies._by_pattern",
        "levels_by_name.update(dict.fromkeys(matches, levels))",
        "levels_by_name = dict.fromkeys(matches, levels) | levels_by_name",
        "the first pattern decides, not the last", PLAN,
    ),
    Mutant(
        "plan.making._follow",
        "layer.kernel_size != info.kernel_size",
        "__import__('math').prod(layer.kernel_size) != __import__('math').prod(info.kernel_size)",
        "a plan of 1x9 kernels fits 3x3 ones", PLAN,
    ),
    Mutant(
        "network.copying._FunctionReplacer._fill",
        "new.cell_contents = self._counterpart(value.cell_contents)",
        "new.cell_contents = value.cell_contents",
        "a copy's functions work on the original", ("test_copying.py",),
    ),
    Mutant(
        "pipeline.side_by_side._SideBySide.compare",
        "[name for name in result.outputs if name not in ran]",
        "[name for name in result.outputs if not name]",
        "layers that only the original runs are not reported", ("test_copying.py",),
    ),
    Mutant(
        "plan.space.axis.SpaceAxis.cost",
        "not own.whole and shape.factorable and shape.positions is not None",
        "not own.whole and shape.positions is not None",
        "a layer without a factored form saves MACs", ("test_convert.py",),
    ),
    Mutant(
        "plan.space.policies.stays_whole",
        "layer.reads_input or layer.fixed or layer.depthwise",
        "layer.reads_input or layer.fixed",
        "depthwise layers are not spared", PLAN,
    ),
    Mutant(
        "plan.space.check._wrong_coefficients",
        "COEFFICIENT_TOLERANCE_EPS * info.eps * expected.abs() + floor",
        "COEFFICIENT_TOLERANCE_EPS * info.eps * expected.abs().max() + floor",
        "small coefficients may be wrong by as much as large ones", VERIFY,
    ),
    Mutant(
        "plan.space.check._wrong_coefficients",
        "floor = largest * exact[0, 0].numel() * FLOAT64_PRODUCTS + info.smallest_normal * info.eps",
        "floor = largest * 0.01 + info.smallest_normal * info.eps",
        "coefficients may be wrong by a hundredth", VERIFY,
    ),
    Mutant(
        "plan.space.check._basis_problem",
        "energy_kept(kernel, best_FK) - 1e-06",
        "energy_kept(kernel, best_FK) - 1.0",
        "another layer's basis passes for this one's", BASES,
    ),
    Mutant(
        "pipeline.structure_check._ATTRIBUTES",
        '"dilation"',
        '"groups"',
        "dilation is not compared", VERIFY,
    ),
    Mutant(
        "pipeline.structure_check.altered_state",
        "not _equal(tensor, converted_tensors[key])",
        "not torch.allclose(tensor, converted_tensors[key])",
        "what was not to change may change a little", VERIFY,
    ),
    Mutant(
        "pipeline.structure_check.altered_state",
        "_tied_to(kernels, original) & _tied_to(kernels, converted)",
        "set()",
        "a tensor that is tied to a coded weight must not differ", OTHER_LAYERS,
    ),
    Mutant(
        "network.layers.observable_layers",
        "id(layer._parameters.get('weight')) not in shared",
        "shared is not None",
        "a decoder is fitted although its weight is an embedding", OTHER_LAYERS,
    ),
    Mutant(
        "plan.axes.has_axis",
        "AXES[axis].matrices or not layer.matrices",
        "True",
        "recurrent layers get ranks", OTHER_LAYERS,
    ),
    Mutant(
        "pipeline.verify.verify",
        "next((error for error in errors if isnan(error)), max(errors))",
        "next((error for error in errors if isnan(error)), min(errors))",
        "the better of two errors is the verdict", VERIFY,
    ),
    Mutant(
        "pipeline.structure_check.as_calibrated",
        "actual.get(key) == sha256",
        "bool(sha256)",
        "whatever calibration may have written passes", (*VERIFY, *REFIT),
    ),
    Mutant(
        "pipeline.verify.verify",
        "not problems and agreement in (None, 1.0)",
        "not problems",
        "another top-1 class passes", VERIFY,
    ),
    Mutant(
        "network.comparison.relative_difference",
        "expected[~finite].nan_to_num(nan=0.5)",
        "actual[~finite].nan_to_num(nan=0.5)",
        "outputs that became infinite pass where the original's are NaN", VERIFY,
    ),
    Mutant(
        "search.knapsack.Frontier.best",
        "np.searchsorted(self.costs, budget, side='right')",
        "np.searchsorted(self.costs, budget, side='left')",
        "a plan that just fits is left out", KNAPSACK,
    ),
    Mutant(
        "search.knapsack._undominated",
        "scores[order][1:] < best[:-1]",
        "scores[order][1:] <= best[:-1]",
        "dearer plans of the same score are kept", KNAPSACK,
    ),
    Mutant(
        "search.knapsack._undominated",
        "np.lexsort((scores, costs))",
        "np.lexsort((costs, scores))",
        "trade-offs are sorted by score, not by cost", KNAPSACK,
    ),
    Mutant(
        "search.knapsack._thinned",
        "last[0] = True",
        "pass",
        "the cheapest of all is thinned out", KNAPSACK,
    ),
    Mutant(
        "kernels.elimination._remove_block",
        "inverse_GRR.baddbmm_(inverse_GNN[:, rest, block], gain_GIR, alpha=-1)",
        "inverse_GRR.baddbmm_(inverse_GNN[:, rest, block], gain_GIR, alpha=1)",
        "the Schur complement with the wrong sign", SEARCH,
    ),
    Mutant(
        "kernels.elimination.eliminate",
        "torch.arange(size, device=gram_GNN.device).view(channels, frequencies).T.flatten()",
        "torch.arange(size, device=gram_GNN.device).view(channels, frequencies).flatten()",
        "channels are eliminated in the place of frequencies", SEARCH,
    ),
    Mutant(
        "search.orders.with_order",
        "order[count - size:]",
        "order[:size]",
        "what should go first is what stays", SEARCH,
    ),
    Mutant(
        "calibration.moments._moments",
        "power += damping * scale_G1",
        "pass",
        "moments without a ridge", SEARCH,
    ),
    Mutant(
        "calibration.solvers.NormalEquations.candidates",
        "1 / (values_GN + damping * scale_G1)",
        "1 / values_GN",
        "normal equations without a ridge", REFIT,
    ),
    Mutant(
        "calibration.solvers.NormalEquations.candidates",
        "residual_GO - (change_GON @ self.sum_GN[..., None])[..., 0]",
        "residual_GO + (change_GON @ self.sum_GN[..., None])[..., 0]",
        "the bias adds what it should take away", REFIT,
    ),
    Mutant(
        "calibration.solvers.NormalEquations.change_of_squares",
        "(D @ self.gram_GNN * weighted).sum() - 2 * (weighted * self.cross_GON).sum()",
        "(D @ self.gram_GNN * weighted).sum() - (weighted * self.cross_GON).sum()",
        "the error after a change counts half of the gain", REFIT,
    ),
    Mutant(
        "calibration.solvers.NormalEquations.candidates",
        "cross = cross - residual_GO[..., None] * self.sum_GN[:, None] / self.count",
        "pass",
        "the right-hand side is not centred", REFIT,
    ),
    Mutant(
        "calibration.solvers.Samples.candidates",
        "values_GR.clamp_min(0).sum(1, keepdim=True) / self.layer.unknowns",
        "values_GR.clamp_min(0).mean(1, keepdim=True)",
        "the dual damps by another scale", REFIT,
    ),
    Mutant(
        "calibration.solvers.Operator._normal",
        "replace(image, kernel=image.kernel + damping * x.kernel)",
        "replace(image, kernel=image.kernel)",
        "conjugate gradients without a ridge", REFIT,
    ),
    Mutant(
        "calibration.equations.Problem.rescaling",
        "au - a * u / self.count",
        "au",
        "the best factor is that of what is not centred", REFIT,
    ),
    Mutant(
        "calibration.equations.Layer.restricted",
        "(rows @ self.direction)[..., None] * self.direction",
        "(rows @ self.direction)[..., None] / self.unknowns",
        "weight standardisation takes a mean away that is none", REFIT,
    ),
    Mutant(
        "calibration.responses.responses",
        "basis_FK.unflatten(1, kernel_size).flip(*range(1, len(kernel_size) + 1)).flatten(1)",
        "basis_FK.unflatten(1, kernel_size).flatten(1)",
        "transposed convolutions are not turned round", REFIT,
    ),
    Mutant(
        "calibration.responses._padded",
        "[edge for pair in reversed(edges) for edge in pair]",
        "[edge for pair in edges for edge in pair]",
        "paddings of height and width are swapped", REFIT,
    ),
    Mutant(
        "calibration.responses._edges",
        "edges.append((d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2))",
        "edges.append((d * (k - 1) - d * (k - 1) // 2, d * (k - 1) // 2))",
        "even kernels are padded on the wrong side", REFIT,
    ),
    Mutant(
        "calibration.responses.pick_positions",
        "torch.tensor(list(examples), dtype=torch.long)[:, None] * count",
        "torch.tensor(list(examples), dtype=torch.long)[:, None]",
        "examples share most of their positions", REFIT,
    ),
    Mutant(
        "kernels.projection.to_groups",
        "return (blocks.transpose(1, 2) if transposed else blocks).flatten(2)",
        "return blocks.flatten(2)",
        "channels in and out of transposed convolutions are mixed up", REFIT,
    ),
    Mutant(
        "calibration.layers.Kernel.write",
        "self.gain.div_",
        "self.gain.mul_",
        "gains are scaled the wrong way", REFIT,
    ),
    Mutant(
        "calibration.layers.choose.take_if_better",
        "error < best.error_after - _LEAST_GAIN * (before + 1)",
        "error < before - _LEAST_GAIN * (before + 1)",
        "the last that is better than nothing is taken, not the best", REFIT,
    ),
    Mutant(
        "calibration.refit.dampings",
        "(damping for damping in DAMPINGS if damping >= least)",
        "(damping for damping in DAMPINGS if damping <= least)",
        "fits on too few positions are damped the least", REFIT,
    ),
    Mutant(
        "calibration.batch_norm._moments",
        "(sums[1] - count * mean.square()).clamp_min(0) / (count - 1)",
        "(sums[1] - count * mean.square()).clamp_min(0) / count",
        "running variances are biased", REFIT,
    ),
    Mutant(
        "calibration.batch_norm.reestimate.watch.hook",
        "torch.cat([mean, var, mean.new_ones(1)]).cpu() * len(x)",
        "torch.cat([mean, var, mean.new_ones(1)]).cpu()",
        "a small last batch counts as much as a whole one", REFIT,
    ),
    Mutant(
        "calibration.holding._Run.ended",
        "self.always_again or _version(layer) != version",
        "self.always_again",
        "a held run goes on with what the layer answered before its refit", HOLDING,
    ),
    Mutant(
        "calibration.holding.Forwards._before",
        "run is not None and run.at != name and (name not in run.passed) and run.valid",
        "run is not None and run.at != name and (name not in run.passed)",
        "a held run goes on though what it passed changed", HOLDING,
    ),
    Mutant(
        "calibration.holding.Forwards._tried",
        "input_summary(run.at, run.shown) != next(expected, None)",
        "not next(expected, None)",
        "networks that runs in turns mix up are run in turns", HOLDING,
    ),
    Mutant(
        "calibration.divergence._kl",
        "p.exp() * (p - q)",
        "q.exp() * (q - p)",
        "the divergence is that of the reverse", REFIT,
    ),
    Mutant(
        "calibration.calibrating._refit",
        "targets = Targets(original, tied_layers, data, settings.seed, min(memory // 2, MOST_TARGETS))",
        "targets = Targets(converted, tied_layers, data, settings.seed, memory // 2)",
        "layers are fitted to what the cut network answers", REFIT,
    ),
    Mutant(
        "calibration.calibrating.never_worse",
        "refit is not None and refit <= plain",
        "refit is not None and refit >= plain",
        "a refit that makes the outputs worse is taken", REFIT,
    ),
    Mutant(
        "calibration.calibrating.blend",
        "before[key] + share * (after[key] - before[key])",
        "before[key] - share * (after[key] - before[key])",
        "half of a change is taken backwards", REFIT,
    ),
    Mutant(
        "network.comparison.close",
        "relative_difference(actual, expected) <= rounding",
        "relative_difference(actual, expected) >= 0",
        "networks that misread another layout are calibrated in it", LAYOUT,
    ),
    Mutant(
        "plan.precision.vectors._rounded_norm",
        'values["weight"] * rounded_deviation / deviation',
        'values["weight"] * deviation / rounded_deviation',
        "the weight of a norm does not make up for its rounded variance", VECTORS,
    ),
    Mutant(
        "plan.precision.vectors._rounded_norm",
        "rounded_mean - mean",
        "mean - rounded_mean",
        "the bias of a norm does not make up for its rounded mean", VECTORS,
    ),
    Mutant(
        "codecs.packed.PackedCodec.decode",
        "places[bit : length * bits : bits].astype(np.int64) << bit",
        "places[bit : length * bits : bits].astype(np.int64) << bits - 1 - bit",
        "the bits of a number are in the wrong order", VECTORS,
    ),
    Mutant(
        "calibration.sensitivity._direction",
        "(output / temperature).softmax(1)",
        "output.softmax(1)",
        "the temperature of measured effects is ignored", ("test_coding.py",),
    ),
)  # fmt: skip
