import math

import pytest
import torch
from training import REGIONS, bare_trainer, batch_of, make_trainer, terms_of

from nnunet_semiseg.losses.copy_paste import draw_mixing_box
from nnunet_semiseg.trainers import ad_mt
from nnunet_semiseg.trainers.ad_mt import ADMTTrainer, combine
from nnunet_semiseg.training import semi_supervised


def of_probability(*ps):
    """Logits (1, 2, 8, 8, 8) whose probability of class 1 differs between the parts of the first axis."""
    p = torch.tensor(ps).repeat_interleave(8 // len(ps)).view(1, 1, 8, 1, 1).expand(1, 1, 8, 8, 8)
    return torch.cat((torch.zeros_like(p), torch.logit(p)), 1)


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def mean_of(first, second):
    weights = [math.exp(-entropy(p)) for p in (first, second)]
    return (weights[0] * first + weights[1] * second) / sum(weights)


def two_teachers(first, second, *args, others_turn=False, **settings):
    """They say these logits; None: what they are shown."""
    teachers = [(lambda x, say=say: x if say is None else say) for say in (first, second)]
    trainer = bare_trainer(ADMTTrainer, *args, teacher=teachers[0], **settings)
    trainer.auxiliary = {"other_teacher": teachers[1]}
    trainer.method_state = {"others_turn": torch.tensor(others_turn)}
    return trainer


@pytest.mark.parametrize("regions", [False, True])
def test_teachers_count_by_their_certainty(regions):
    """0.9 and 0.4, with the entropies 0.325 and 0.673: weights 0.723 and 0.510, and so 0.693."""
    ps = [torch.tensor([p if regions else 1 - p, p]).view(1, 2, 1, 1, 1) for p in (0.9, 0.4)]
    logits = combine(ps, regions)
    p = logits.sigmoid() if regions else logits.softmax(1)
    assert p[0, 1].item() == pytest.approx(mean_of(0.9, 0.4), abs=1e-6) == pytest.approx(0.693, abs=1e-3)


@pytest.mark.parametrize(
    ("consistency", "threshold", "expected"),
    [
        ("dice_ce", 0.7, -(math.log(0.8) + math.log(0.2)) / 2),
        ("paper", 0.7, -(math.log(0.8) + math.log(0.2)) / 2),
        ("dice_ce", 0.8, -math.log(0.8) / 2),
        ("paper", 0.8, -math.log(0.8)),
    ],
)
def test_the_losses_by_hand(consistency, threshold, expected):
    """On the weak view the student says 0.25: class 0, with 0.75. On the strong one it says 0.8.

    In the first half both teachers are for class 1, with 0.85 together: that counts, whatever the student says. In the
    other half they are for different classes; their mean, 0.69, is for class 1, and less sure than the student.
    """
    trainer = two_teachers(
        of_probability(0.9, 0.9),
        of_probability(0.8, 0.4),
        consistency=consistency,
        consistency_weight=3.0,
        match_threshold=threshold,
    )
    weak = of_probability(0.25)
    terms = terms_of(trainer, batch_of(weak, weak=weak, strong=of_probability(0.8)))
    assert terms["supervised"].item() == pytest.approx(-math.log(0.75))
    assert terms["consistency"].item() == pytest.approx(3 * expected, rel=1e-4)
    assert trainer.decide.shares.sums[1].item() == pytest.approx(0.5)  # class 1 in the first half alone


def test_a_student_that_is_less_sure_says_nothing():
    trainer = two_teachers(of_probability(0.9), of_probability(0.4), match_threshold=0.69)
    decision, weight = trainer.ask_teachers(of_probability(0.35))  # for class 0, with 0.65
    assert decision.all() and weight.all()


def test_where_teachers_agree_a_surer_student_says_nothing():
    decision, _ = two_teachers(of_probability(0.8), of_probability(0.7)).ask_teachers(of_probability(0.05))
    assert decision.all()


def test_regions_are_decided_together():
    """Region 0 is 0.9 for all; region 1 is 0.8 and 0.3, in a mean of about 0.56, and 0.1 for the student.

    The student is surer, so that its decision stands: region 1 is not there.
    """

    def say(p):
        return torch.logit(torch.tensor([0.9, p])).view(1, 2, 1, 1, 1).expand(1, 2, 8, 8, 8)

    decision, weight = two_teachers(say(0.8), say(0.3), REGIONS).ask_teachers(say(0.1))
    assert decision[:, 0].all() and not decision[:, 1].any() and weight.all()


@pytest.mark.parametrize("others_turn", [False, True])
def test_in_the_others_turn_weak_views_are_mixed(others_turn, monkeypatch):
    """Two samples, of 0.9 and 0.2, each with the other's first half; all say what they are shown.

    Mixed or not, the halves of both samples together have the losses -log 0.9 and -log 0.8. The strong view says 0.5.
    """
    box = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    box[:, :, :4] = True
    monkeypatch.setattr(ad_mt, "draw_mixing_box", lambda x, often: box)
    weak = torch.cat((of_probability(0.9), of_probability(0.2)))
    shown = []
    trainer = two_teachers(None, None, others_turn=others_turn)
    trainer.network = lambda x: (shown.append(x), x)[1]
    terms = terms_of(trainer, batch_of(weak, weak=weak, strong=0 * weak))
    expected = -(math.log(0.9) + math.log(0.8)) / 2 if others_turn else math.log(2)
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-4)
    if others_turn:
        assert torch.equal(shown[-1], torch.where(box, weak.flip(0), weak))


def test_boxes_of_cutmix():
    """Of a slice a box is b, from Beta(4, 4), whose mean is 1/2; half of the draws have one."""
    torch.manual_seed(0)
    shares = [draw_mixing_box(torch.zeros(1, 1, 40, 40), 0.5).float().mean().item() for _ in range(400)]
    boxes = [share for share in shares if share]
    assert 160 < len(boxes) < 240 and 0.46 < sum(boxes) / len(boxes) < 0.54
    assert min(boxes) < 0.25 and max(boxes) > 0.75 and draw_mixing_box(torch.zeros(1, 1, 40, 40), 0).sum() == 0


def test_teachers_follow_in_turns(monkeypatch):
    """The first for the 2 steps that are left, the other for 1, the first for 3; the other begins as a copy, at 0."""
    moved, periods = [], iter([1, 3, 2])
    for module in (ad_mt, semi_supervised):
        monkeypatch.setattr(module, "update_teacher", lambda teacher, _, step, decay: moved.append((teacher, step)))
    trainer = two_teachers(None, None, ema_decay=0.9)
    first, other = trainer.teacher, trainer.auxiliary["other_teacher"]
    trainer.method_state |= {"steps_left": torch.tensor(2), "others_start": torch.tensor(3)}
    trainer.draw_period = lambda: next(periods)
    for trainer.step in range(1, 7):
        trainer.move_teacher()
    assert moved == [(first, 1), (first, 2), (other, 0), (first, 4), (first, 5), (first, 6)]
    assert trainer.method_state["others_turn"] and trainer.method_state["steps_left"] == 2


def test_turns_are_of_any_length_up_to_the_period():
    trainer = two_teachers(None, None, period=3)
    drawn = []
    for trainer.step in range(40):
        drawn.append(trainer.draw_period())
        assert drawn[-1] == trainer.draw_period()  # in every process
    assert set(drawn) == {1, 2, 3}


def test_the_other_teacher_begins_as_the_network(ready):
    trainer = make_trainer(ADMTTrainer, ready(dims=2, size=32))
    trainer.initialize()
    with torch.no_grad():
        for p in trainer.network.parameters():
            p.fill_(0.5)  # as -pretrained_weights does
    trainer.on_train_start()
    other = trainer.auxiliary["other_teacher"]
    assert all((p == 0.5).all() and not p.requires_grad for p in other.parameters()) and not other.training
    state = trainer.method_state
    assert 1 <= state["steps_left"] <= trainer.settings.period and state["others_start"] == state["steps_left"] + 1


def test_the_papers_weight():
    settings = ADMTTrainer.settings_class
    assert settings().weight(0.4) == 1 and settings(consistency="paper").weight(0.4) == 2
