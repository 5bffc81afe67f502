"""Logs with the losses' earlier names are read under the present names; other names stay as they are."""

from echodistill_core.training.run import Run

OLD = (
    '{"step": 1, "teacher": 1.0, "teacher_gradient": 2.0, "identity": 3.0, "alignment": 4.0, "fool_dinov2": 5.0, '
    '"student_gradient": 6.0, "critic_dino": 7.0, "critic_gradient": 8.0, "student": 9.0, "teacher_prior": 10.0}\n'
)
NEW = {
    "step": 1,
    "recon_teacher": 1.0,
    "grad_norm_teacher": 2.0,
    "identity": 3.0,
    "alignment": 4.0,
    "adv_dinov2": 5.0,
    "grad_norm_student": 6.0,
    "critic_dino": 7.0,
    "grad_norm_critics": 8.0,
    "recon_student": 9.0,
    "prior_teacher": 10.0,
}


def test_an_old_log_has_todays_names_and_goes_on_with_them(tmp_path):
    path = tmp_path / "distil" / "log.jsonl"
    path.parent.mkdir()
    path.write_text(OLD + OLD.replace('"step": 1', '"step": 2'), encoding="utf-8")
    run = Run(tmp_path, {})
    assert run.read_log("distil") == [NEW, {**NEW, "step": 2}]
    run.rewind_log("distil", 1)
    later = {"step": 2, "adv_dino": 0.5, "image-gradient": 1.0, "adv_registers": 2.0}
    run.log("distil", (later,))
    assert run.read_log("distil") == [NEW, later]
