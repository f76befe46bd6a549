"""Faults made by hand, each with the tests that must see it: do the tests test anything?

    python tests/mutations.py [NAME ...] [--jobs 2]     (make mutations)

Every fault is a small change of one place in the source. The tree is copied into a temporary
folder, the fault is put in, and the tests named are run there; that they pass is a failure. That
each fault still finds its place is checked by `test_mutations`, in every run of the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("stq_compile", "passes", "codegen", "tests", "examples", "pyproject.toml")
LIMIT = 1800.0
"""Seconds that the tests of one fault may take."""


@dataclass(frozen=True)
class Mutation:
    """``old``, which is in ``file`` once, becomes ``new``; one of ``tests`` must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _m(name: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    return Mutation(name, file, old, new, tuple(f"tests/{test}" for test in tests))


REFERENCE = "stq_compile/reference.py"
LEVELS = "test_reference.py::test_nearest_rounding_takes_the_nearest_of_all_codes"
BITS = "codegen/test_kernel_numerics.py::test_every_format_bit_for_bit"
DECISION = "planner/test_decision.py"
BROKEN = "test_checkpoint.py::test_a_broken_checkpoint_is_refused_whole"
RESUME = "test_checkpoint.py::test_resume_is_exact_to_the_bit"

MUTATIONS = (
    # Formats, layout, reference, random numbers.
    _m("bytes without scales", "stq_compile/formats.py",
       "return block_count(numel) * (self.block_bytes + 2)",
       "return block_count(numel) * self.block_bytes",
       "test_formats.py::test_bytes_are_what_the_formula_says_and_what_the_buffers_occupy"),
    _m("signed log", "stq_compile/formats.py",
       'return self.kind != "adaptive_log"', "return True",
       "test_formats.py::test_facts_of_a_format"),
    _m("normalized before non-negative", "stq_compile/formats.py",
       "    if nonnegative:\n", "    if nonnegative and not normalizable:\n",
       "test_formats.py::test_choose_format"),
    _m("planes of a field", "stq_compile/layout.py",
       "byte |= field[:, plane] << (bits * k)", "byte |= field[:, plane] << (bits * (k ^ 1))",
       "test_layout.py::test_every_code_in_every_position_comes_back"),
    _m("fields in another order", "stq_compile/formats.py", "5: (4, 1),", "5: (1, 4),",
       "test_layout.py::test_bytes_of_every_code_are_the_documented_ones"),
    _m("softsign's half", REFERENCE,
       "p = (t - k) * ((2.0 * top - 1.0) - k) * (w * (1.0 / (2.0 * top)))", "p = t - k", LEVELS),
    _m("scales rounded down", REFERENCE,
       "rounded = (absmax + ((1 << drop) - 1)) >> drop", "rounded = absmax >> drop",
       "test_reference.py::test_the_scale_is_the_largest_magnitude_rounded_up"),
    _m("broken blocks hidden", REFERENCE,
       "return torch.where(absmax >= INFINITY_BITS, kept, bounded)", "return bounded",
       "test_reference.py::test_a_broken_number_shows_and_stays_in_its_block"),
    _m("tail of the range", REFERENCE,
       "spread = fma(root(variance), torch.tensor(TAIL_DEVIATIONS[width]), -(mean + moved))",
       "spread = fma(root(variance), torch.tensor(1.5), -(mean + moved))",
       "test_reference.py::test_the_range_follows_mean_and_deviation_of_log2"),
    _m("an array's place is taken while it is read", "codegen/schedule.py",
       "read <= place[id(heir)]", "True",
       "codegen/test_schedule.py::test_not_while_the_old_one_is_still_read"),
    _m("zeros are levels apart from zero", REFERENCE,
       "number = (scale_bits > 0) & (scale_bits < INFINITY_BITS)\n    spacing = torch.where",
       "number = scale_bits < INFINITY_BITS\n    spacing = torch.where",
       "test_reference.py::test_a_block_that_becomes_zero_has_the_code_of_zeros"),
    _m("scratch of other threads", "codegen/cpp/build.py",
       "            self.threads = 0  # what is interrupted here begins anew\n", "",
       "codegen/test_emit.py::test_a_run_that_was_interrupted_takes_its_memory_anew"),
    _m("no slack between scales", REFERENCE, "ORIGIN_SLACK = 2.0**-21", "ORIGIN_SLACK = 0.0",
       "test_reference.py::test_no_noise_leads_past_the_codes_wherever_the_old_scale_was"),
    _m("kernel: the old scale's range is taken for the new one's", "codegen/expand.py",
       'b.op("add", mean, moved)', "mean", BITS),
    _m("hooks of all optimizers are forgotten", "stq_compile/steps.py",
       "        or optim._global_optimizer_pre_hooks\n", "",
       "test_compile.py::test_hooks_of_all_optimizers_run_as_well"),
    _m("padding counts", REFERENCE, "valid = _pad(torch.ones(count, device=x.device)) > 0",
       "valid = _pad(torch.ones(count, device=x.device)) >= 0",
       "test_reference.py::test_a_tail_gets_the_scale_of_its_elements_alone"),
    _m("midrise clip", REFERENCE, "* (MIDRISE_CLIP[format.width] / half)", "* (2.0 / half)",
       "test_reference.py::"
       "test_midrise_reaches_to_a_multiple_of_the_root_mean_square_or_to_the_largest"),
    _m("blocks draw alike", "stq_compile/rounding.py",
       "index = torch.arange(first_block, first_block + blocks, dtype=torch.int64, device=device)",
       "index = torch.arange(0, blocks, dtype=torch.int64, device=device)",
       "test_rounding.py::test_bits_do_not_depend_on_the_range_that_is_asked_for"),
    _m("streams alike", "stq_compile/rounding.py",
       "return (param_index << 32) | zlib.crc32(state.encode())", "return param_index << 32",
       "test_rounding.py::test_a_stream_is_named_by_parameter_and_state"),
    # Kernels.
    _m("kernel: decode of the log", "codegen/expand.py",
       'b.op("int_mul", spacing, format.top_code)', 'b.op("int_mul", spacing, format.top_code - 1)',
       BITS),
    _m("kernel: pull of the mean", "codegen/expand.py",
       'b.op("min", b.op("mul", spacing, OCTAVE), 1.0)',
       'b.op("min", b.op("mul", spacing, OCTAVE), 0.5)', BITS),
    _m("kernel: probability of softsign", "codegen/expand.py",
       'b.op("sub", 2.0 * top - 1.0, k))', 'b.op("sub", 2.0 * top, k))', BITS),
    _m("kernel: tie of bfloat16", "codegen/expand.py", 'low = b.op("int_add", odd, 0x7FFF)',
       'low = b.op("int_add", odd, 0x7FFE)', BITS),
    _m("kernel: a thread's first tensor", "codegen/cpp/run.py",
       "      int64_t i = b - start[r];\n", "      int64_t i = 0;\n",
       "codegen/test_kernel_numerics.py::test_results_do_not_depend_on_the_number_of_threads"),
    _m("kernel: the tail is left out", "codegen/cpp/run.py",
       "        tile<true>(row, scalar, step, last, 1, count);\n", "",
       BITS),
    _m("kernel: scratch of one row", "codegen/cpp/run.py",
       "return n_rows * sizeof(Scalars) + (n_rows + 1) * 8;",
       "return sizeof(Scalars) + (n_rows + 1) * 8;",
       "codegen/test_emit.py::test_adamw_packed"),
    _m("normalizer decoded last", "passes/quantize.py",
       "sorted(packed, key=lambda n: n in normalizer_of)",
       "sorted(packed, key=lambda n: n not in normalizer_of)",
       "passes/test_quantize.py::test_a_normalizer_is_decoded_first_and_encoded_first"),
    # Run time and storage.
    _m("stale pointers", "stq_compile/storage.py",
       "        self.version += 1\n        PackedStorage.replacements = next(_REPLACEMENTS)\n",
       "        self.version += 1\n",
       "test_widths.py::test_twenty_changes_and_no_recompile",
       "test_threads.py::test_no_number_of_replacements_comes_twice"),
    _m("other layouts trusted", "stq_compile/runtime.py",
       "return tensors if [t.stride() for t in tensors] == strides else None", "return tensors",
       "test_changes.py::test_a_new_layout_is_captured_afresh"),
    _m("dependents forgotten", "stq_compile/storage.py",
       "        for state in list(self._dependents):\n", "        for state in ():\n",
       "test_storage.py::test_values_stay_when_the_normalizer_changes"),
    _m("a failed change is kept", "stq_compile/session.py",
       "            for storage, buffers in kept:\n                storage.restore(buffers)\n", "",
       "test_codec.py::test_a_failure_in_the_midst_puts_everything_back"),
    _m("signals are not held", "stq_compile/interrupts.py",
       "                _signal.signal(number, self._note)\n", "                pass\n",
       "test_interrupts.py::test_a_held_signal_arrives_when_the_scope_ends"),
    _m("steps of one optimizer overlap", "stq_compile/driver.py",
       "        with self.lock:\n            self.session.decide()",
       "        if True:\n            self.session.decide()",
       "test_threads.py::test_steps_of_one_optimizer_take_turns"),
    _m("every step rounds alike", "stq_compile/compiled_step.py",
       "            session.steps += 1\n", "            session.steps += 0\n",
       "test_optimizers.py::test_codes_equal_the_reference"),
    _m("old kernels by name", "codegen/cpp/build.py",
       "whole = \"\\0\".join([_run_time_library(), source, ",
       "whole = \"\\0\".join([source, ",
       "codegen/test_cache.py::test_what_the_machine_code_depends_on_is_in_the_key"),
    _m("damaged kernels are loaded", "codegen/cpp/cache.py",
       "        if noted.read_text() == _digest(library.read_bytes()):\n",
       "        if noted.read_text() and library.read_bytes():\n",
       "codegen/test_cache.py::test_a_damaged_file_is_built_again"),
    _m("another's folder", "codegen/cpp/cache.py",
       '        return "it belongs to another user"\n', '        return ""\n',
       "codegen/test_cache.py::test_a_folder_that_cannot_be_trusted_is_not_used"),
    _m("the compiler may hang", "codegen/cpp/compiler.py",
       "            os.killpg(process.pid, signal.SIGKILL)\n", "            process.kill()\n",
       "test_compiler_failures.py::test_a_hanging_compiler_leaves_no_process"),
    # Planner.
    _m("a budget that is exceeded", "stq_compile/planner/hull.py",
       'room, side="right"))', 'room, side="right")) + 1',
       f"{DECISION}::test_the_budget_is_never_exceeded"),
    _m("the steepest first", "stq_compile/planner/hull.py",
       "np.where(np.isinf(slope), extra, 0), -slope))",
       "np.where(np.isinf(slope), extra, 0), slope))",
       f"{DECISION}::test_the_gap_is_below_a_step"),
    _m("no dwell", "stq_compile/planner/table.py",
       "[s.waited < rules.dwell for s in self.states]", "[False for s in self.states]",
       f"{DECISION}::test_a_change_waits_for_the_dwell_time"),
    _m("two rungs", "stq_compile/planner/table.py",
       "(distance <= rules.rungs)", "(distance <= rules.rungs + 1)",
       f"{DECISION}::test_a_state_moves_one_rung_and_an_alarm_several"),
    _m("no hysteresis", "stq_compile/planner/table.py",
       "margin = rules.hysteresis * np.where(pays, known, 0)",
       "margin = 0 * np.where(pays, known, 0)", f"{DECISION}::test_noise_moves_no_width"),
    _m("an unbounded correction", "stq_compile/planner/selection.py",
       "return min(max(total, -self.limit), self.limit)", "return total",
       "planner/test_selection.py::test_corrections_are_bounded"),
    _m("history without end", "stq_compile/planner/history.py",
       "deque(records, maxlen=LIMIT)", "deque(records)",
       "planner/test_planner.py::test_history_is_bounded_and_plain"),
    _m("a planner that is not put back", "stq_compile/planner/planner.py",
       "            vars(self).update(before)\n", "            pass\n",
       "test_planning.py::test_a_failed_transition_leaves_everything"),
    # Loader.
    _m("codes beyond the last level", "stq_compile/saved_state.py",
       "if int(chunk.max()) > format.top_code:", "if int(chunk.max()) > 255:", BROKEN),
    _m("scales that are not finite", "stq_compile/saved_state.py",
       "if bool(((words != 0) & ((scales < least) | (scales >= reference.INFINITY_BITS))).any()):",
       "if False:", BROKEN),
    _m("scales below the least", "stq_compile/saved_state.py",
       "(scales < least) | ", "", BROKEN),
    _m("sizes that do not fit", "stq_compile/saved_state.py",
       "        if entry.get(name) != expected:\n", "        if name not in entry:\n", BROKEN),
    _m("random numbers begin anew", "stq_compile/checkpoint.py",
       "session.seed, session.steps, session.plan = self.seed, self.steps, self.plan",
       "session.seed, session.plan = self.seed, self.plan", RESUME),
    _m("versions to come", "stq_compile/checkpoint.py",
       "    if version != VERSION:\n", "    if version is None:\n", BROKEN),
    _m("writes are not counted", "stq_compile/saved_state.py",
       "    storage.eager_writes = saved.eager_writes\n", "",
       "test_eager_steps.py::test_a_resumed_run_has_the_same_bits"),
    _m("names are markup", "stq_compile/reporting/page.py",
       "jinja2.Environment(autoescape=True,", "jinja2.Environment(autoescape=False,",
       "test_run_report.py::test_the_page_needs_nothing_and_escapes_everything"),
    _m("control characters pass", "stq_compile/reporting/run_file.py",
       "event = all_printable(json.loads(line))", "event = json.loads(line)",
       "test_security.py::test_names_are_text_in_the_terminal"),
)  # fmt: skip


def apply(mutation: Mutation, root: Path) -> None:
    """Put a fault in; raises ValueError if its place is not there, or not the only one."""
    file = root / mutation.file
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} places like "
            f"{mutation.old!r}; a fault needs one"
        )
    file.write_text(text.replace(mutation.old, mutation.new))


def copy_tree(to: Path) -> None:
    """The sources and tests, so that Python finds the package there and nowhere else."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)
    for name in ("passes", "codegen"):
        (to / "stq_compile" / name).symlink_to(to / name)


def seen(mutation: Mutation) -> tuple[bool, str]:
    """Whether its tests fail with the fault; and the end of what they printed."""
    with tempfile.TemporaryDirectory(prefix="stq_mutation_") as folder:
        copy_tree(Path(folder))
        apply(mutation, Path(folder))
        environment = {
            **os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1",
            "STQ_CACHE_DIR": f"{folder}/kernels", "CI": "true",
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *mutation.tests], cwd=folder, env=environment, text=True, timeout=LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    # 1: a test has failed; below 0: a fault has crashed the process; else the list is mistaken.
    return done.returncode == 1 or done.returncode < 0, done.stdout[-1500:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="faults to try; all, if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if not options.names or m.name in options.names]
    missed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, (found, output) in zip(chosen, pool.map(seen, chosen), strict=True):
            print(f"{'seen' if found else 'MISSED'}: {mutation.name}", flush=True)
            if not found:
                missed += 1
                print(output, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults were seen")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
