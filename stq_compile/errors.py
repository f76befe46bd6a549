"""Every mistake has a class of its own, and every message says what, where and what to do."""

from __future__ import annotations

OUT_OF_MEMORY = ("can't allocate memory", "could not allocate memory", "out of memory")
LEFT_AS_IT_WAS = "\nThe optimizer is left as it was"


class StqError(Exception):
    """Base of all errors that stq_compile raises on purpose.

    A subclass sets ``message``, a template; the constructor takes its fields by name, so
    that a raise site can't leave out the place or the remedy.
    """

    message = "{detail}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.message.format(**fields))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.fields))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out; torch says so by a RuntimeError, and on the CPU by a plain one."""
    if isinstance(error, RuntimeError):
        return any(text in str(error).lower() for text in OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """``"ValueError: bad"``: an error in one line."""
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def _rebuild(cls: type[StqError], fields: dict[str, object]) -> StqError:
    return cls(**fields)


class UncompiledStepError(StqError):
    """A step that cannot be compiled, and may run eagerly instead (`stq_compile.eager`).

    A subclass sets ``why`` too, the part of the message that an eager step's warning repeats: what
    follows it in ``message`` is of an optimizer that is left to itself.
    """

    message = why = "{optimizer}: its step cannot be compiled: {detail}"

    @property
    def explanation(self) -> str:
        """The message without what becomes of the optimizer where nothing runs eagerly."""
        return self.why.format(**self.fields).strip()


class StqWarning(UserWarning):
    """Base of all warnings: what is going on, what it costs, and what to do."""

    message = "{detail}"

    def __init__(self, **fields: object) -> None:
        super().__init__(self.message.format(**fields))


class EagerStepWarning(StqWarning):
    message = (
        "{optimizer}: its step runs eagerly, on packed states, because it cannot be compiled. "
        "Results are right and states stay packed between steps, but every step decodes and "
        "encodes them in plain torch, which takes several times as long. {reason}"
    )


class MixedErrorsWarning(StqWarning):
    message = (
        "{optimizer}: its step multiplies matrices and runs eagerly, so that there is no graph to "
        "say whether a product mixes the rounding errors of states with fewer than {width} bits "
        "({states}). Where one does, as in Muon and SOAP, such a state trains worse: with "
        "{key!r}: {width} in the option precision it has the bits that it needs then."
    )


class CopyPrecisionWarning(StqWarning):
    message = (
        "{optimizer}: after {steps} steps the weights are no farther from their copies among the "
        "states ({states}) than those are rounded: what the step makes of the difference is "
        "mostly rounding. With {pins} in the option precision (and tolerance or target_bits, where "
        "the other states are to be planned) they are exact, from the first step on."
    )


class ParamRoundingWarning(StqWarning):
    message = (
        "{optimizer}: param_rounding={rounding!r} has no effect on steps that run eagerly: its "
        "16-bit parameters are rounded to nearest, as torch does, after every operation. What "
        "keeps the step from being compiled stands in stq.report(optimizer).note."
    )


class KernelCacheWarning(StqWarning):
    message = (
        "compiled kernels cannot be kept in {folder}: {reason}. Every process compiles them anew, "
        "some seconds each time; set {variable} to a folder of your own."
    )


class PlanningWarning(StqWarning):
    message = (
        "{optimizer}: after step {step} the planner could not {action}: {reason}. Nothing is lost: "
        "all states keep the widths that they have, and the planner tries again at its next look. "
        "If this goes on, memory stays as it is, and so does a budget that is exceeded; {remedy}."
    )


class UnknownOptionError(StqError):
    message = "unknown option {name!r}; the options are: {valid}"


class InvalidOptionError(StqError):
    message = "option {name}={value!r} is not valid: {reason}"


class ContradictoryOptionsError(StqError):
    message = "options {first!r} and {second!r} contradict each other: {reason}"


class UnmatchedPrecisionError(StqError):
    message = (
        "{optimizer}: the key {key!r} of option precision matches no state of any parameter; "
        "the states are {states}; write 'state' or 'param:state', where * stands for anything "
        "(parameters: {params}). The optimizer is left as it was."
    )


class UnsupportedWidthError(StqError):
    message = "{where}: a width of {width} bits does not exist; the widths are {valid}"


class FormatMismatchError(StqError):
    message = "{where}: {found}; expected {expected}"


class NegativeStateError(StqError):
    message = (
        "cannot store a negative value (minimum {minimum}) in a state kept in the non-negative "
        "format {format}; give that state precision 16 or 32, or a signed format"
    )


class IndefiniteStateError(StqError):
    message = (
        "cannot store {found} in a state kept as a Cholesky factor ({format}), which holds "
        "symmetric positive semidefinite matrices; give that state another precision, 32 for "
        "float32"
    )


class NotAnOptimizerError(StqError):
    message = (
        "stq.compile takes a torch.optim.Optimizer, not {found}; "
        "pass the optimizer itself, as in stq.compile(torch.optim.AdamW(model.parameters()))"
    )


class AlreadyCompiledError(StqError):
    message = (
        "this {optimizer} is already compiled by stq_compile; "
        "make a new optimizer to compile it with other options"
    )


class NotCompiledError(StqError):
    message = "this {optimizer} is not compiled by stq_compile; call stq.compile(optimizer) first"


class OptimizerNotFoundError(StqError):
    message = (
        "backend 'stq' compiles the step of an optimizer, and found none in the frame {frame}; "
        "use torch.compile(optimizer.step, backend='stq') or stq.compile(optimizer)"
    )


class UnsupportedOptimizerError(StqError):
    message = "{optimizer} cannot be compiled: {reason}. It is left as it was."


class ShardedStateError(StqError):
    message = (
        "{optimizer}, {source}: the step makes a state of shape {shape} for a sharded parameter of "
        "another shape, and how that is to be sharded is not known. Make such states before the "
        "step (in `_init_group`, from the parameter). The optimizer is left as it was."
    )


class ShardedEagerStepError(StqError):
    message = (
        "{optimizer} cannot be compiled: {reason}; and with sharded parameters a step is not run "
        "eagerly. The optimizer is left as it was."
    )


class RandomStepError(UncompiledStepError):
    why = (
        "{optimizer}: the step draws random numbers ({operator}), and a compiled step would draw "
        "them in another order\n  at {location}"
    )
    message = why + LEFT_AS_IT_WAS + "."


class UnsupportedOperatorError(UncompiledStepError):
    why = (
        "{optimizer}, {source}: the operator {operator} cannot be traced ({reason})\n"
        "  at {location}"
    )
    message = why + LEFT_AS_IT_WAS + "; rewrite that line to have its step compiled."


class SharedScalarError(UncompiledStepError):
    why = "{optimizer}: the step changes {source}, which all parameters share\n  at {location}"
    message = why + LEFT_AS_IT_WAS + "."


class LostAttributeError(UncompiledStepError):
    why = (
        "{optimizer}: its step sets {attributes} of the optimizer itself, which torch.compile "
        "cannot carry over; kept in `state` or in a parameter group, it would be compiled:\n"
        "  {places}"
    )
    message = why + LEFT_AS_IT_WAS + "."


class SharedMemoryError(UncompiledStepError):
    why = "{optimizer}: {first} and {second} share memory, and a kernel would update them apart"
    message = why + LEFT_AS_IT_WAS + "."


class UnsupportedOutputError(UncompiledStepError):
    why = "{optimizer}: the step stores {found}\n  at {location}"
    message = (
        why + LEFT_AS_IT_WAS + "; store clones of tensors, and of a size that does not change."
    )


class ChangedTensorError(StqError):
    message = (
        "{source}: its {what} changed since the step was compiled: {found}, compiled for {expected}"
    )


class TooManyGraphsError(UncompiledStepError):
    message = why = (
        "{optimizer}: its step was captured {graphs} times in {steps} steps, and needs yet another "
        "graph: something in it changes again and again (a Python number, a branch, a shape)"
    )


class InternalError(UncompiledStepError):
    why = (
        "{optimizer}: the compiler failed: {reason}. "
        "This is a defect of stq_compile; please report it{repro}"
    )
    message = (
        "{optimizer}: the compiler failed: {reason}\n"
        "The optimizer is left as it was. This is a defect of stq_compile; please report it{repro}"
    )


class NonFiniteGradientError(StqError):
    message = (
        "{optimizer}, step {step}: the gradient of {param} is not finite{others}. Nothing was "
        "changed, the gradients neither: lower the learning rate or clip, use a GradScaler with "
        "float16, or have such steps left out with on_nonfinite='skip'"
    )


class UnskippableStepError(StqError):
    message = (
        "{optimizer}, step {step}: the gradient of {param} is not finite{others}, and a step that "
        "torch.compile runs cannot be left out whole where it also changes what is no tensor or "
        "makes new states. Nothing was changed; use stq.compile(optimizer, on_nonfinite='skip')"
    )


class RunFileError(StqError):
    message = "{file}, line {line}: {reason}; a run file is what stq.report(optimizer).save wrote"


class TracingError(StqError):
    message = (
        "{operation} on a packed state inside torch.compile: only the optimizer's own step is "
        "compiled on packed states; call state.dequantize() outside of the compiled function"
    )


class UnknownInputError(UncompiledStepError):
    why = (
        "{optimizer}: graph input {name} is neither a parameter, a gradient, a state nor a "
        "scalar of the optimizer ({reason})\n  at {location}"
    )
    message = why + LEFT_AS_IT_WAS + "."


class GraphBreakError(UncompiledStepError):
    why = "{optimizer}: torch.compile could not capture the step as one graph:\n{reason}"
    message = why + LEFT_AS_IT_WAS + "."


class InvalidGraphError(StqError):
    message = "after pass {stage}: {reason}\n{graph}"


class InvalidKernelError(StqError):
    message = "kernel {kernel}, {op}: {reason}"


class DuplicateLoweringError(StqError):
    message = "the operator {operator} has a lowering already; remove one of the two"


class KernelBuildError(UncompiledStepError):
    message = why = (
        "the C++ compiler failed on kernel {kernel} ({source}):\n{output}\n"
        "Check that g++ 9 or newer (or the compiler in $CXX) is installed and works "
        "(`stq doctor`), and start again."
    )


class StepMemoryError(StqError, MemoryError):
    message = (
        "{optimizer}: out of memory in its step ({reason}). Parameters and states are those of "
        "before the step. Free some memory (gradients of another batch, cached data; a smaller "
        "precision or target_bits) and call step() again: nothing else needs to be done."
    )


class StepCaptureError(StqError):
    message = (
        "{what}: the step cannot be captured in a CUDA graph: {reason}. Nothing was changed.\n"
        "{remedy}"
    )


class EagerStepMemoryError(StqError, MemoryError):
    message = (
        "{optimizer}: out of memory in its step, which runs eagerly ({reason}). As with the stock "
        "optimizer, the parameters that it had come to are updated and the others are not; every "
        "packed state is as before the step or as after it, and no state is lost. Free some memory "
        "and go on with the next batch, or load the last checkpoint."
    )


class PartialStepError(StqError):
    message = (
        "{optimizer}: its step failed after {done} of {total} parameters were updated ({reason}). "
        "Every parameter and each of its states is either as before the step or as after it, and "
        "no state is lost. Go on with the next batch, or load the last checkpoint if a step that "
        "only some parameters made is not to be."
    )


class InfeasibleBudgetError(StqError):
    message = (
        "a budget of {budget} bytes cannot hold all states: {fixed} bytes go to states that are "
        "pinned, excluded, smaller than min_numel or kept exact, and the {states} others take "
        "{needed} bytes at the smallest widths allowed (8 bits for a sum over all steps). Raise "
        "target_bits, or lift the pins (precision), exclude and min_numel."
    )


class CheckpointError(StqError):
    message = (
        "cannot load the checkpoint: {entry} is {found}, expected {expected}. "
        "Nothing was loaded; the optimizer is as it was."
    )


class InvalidTargetError(StqError):
    message = "{target}: {reason}"


class UnsupportedDeviceError(StqError):
    message = (
        "{source} is on device {device}, on which steps cannot be run: {reason}. Supported are the "
        "CPU, NVIDIA GPUs of compute capability 8.0 or higher, and AMD GPUs of the gfx9 family"
    )


class TritonMissingError(StqError):
    message = (
        "kernels for a GPU need Triton 3.6 or newer, and it cannot be imported ({reason}); "
        "install it with `pip install triton` (Linux), or keep the parameters on the CPU"
    )


class UnsupportedTargetError(StqError):
    message = "there is no target {target!r} ({reason}); the targets are {valid}"


class TritonCompileError(StqError):
    message = "Triton could not compile kernel {kernel} for {target}:\n{output}"


class UnsupportedElementError(StqError):
    message = (
        "kernel {kernel}: {operand} has elements of {dtype}, which target {target} cannot load and "
        "store; it can: {valid}"
    )
