"""What the page says about how it is done, with the figures of base.yaml."""

from benchmarks.mini.tables import BASE, MODEL, RESAMPLES, Miniature
from pipeline.config_file import load_pipeline
from pipeline.recipe import TrainingConfig
from stages import KINDS


def explanation(miniature: Miniature) -> str:
    """Data, model, budgets, evaluation, statistics."""
    pipeline = load_pipeline(BASE, [], KINDS)
    people, model = pipeline.stages["data"].people, pipeline.stages[MODEL]
    backbone, teacher = model.model.backbone, pipeline.stages["teacher"].model.backbone
    size, grid, heatmaps = backbone.image_size, backbone.grid, model.model.heatmap_size
    budgets = "\n".join(
        f"| `{name}` | {stage.steps:,} | {stage.global_batch_size} | {stage.steps * stage.global_batch_size:,} |"
        for name, stage in pipeline.stages.items()
        if isinstance(stage, TrainingConfig) and name != MODEL
    )
    return f"""## How it is done

```
make mini                                    # what has no result yet: one seed of all tables first, then the next
make mini MINI="--minutes 30 --table 8"      # one table, and no run starts after half an hour
make mini MINI=--report                      # this page alone, from benchmarks/mini/results
```

Every run is a pipeline: [base.yaml](../benchmarks/mini/base.yaml) with the words of
[rows.yaml](../benchmarks/mini/rows.yaml), through the same code as `vitruvian run`. Stages that runs share (data, shards,
pretraining, teacher, token) are made once a seed and found again by their fingerprints. A result is one file in
`benchmarks/mini/results`; one whose settings have changed since is stale, left out, and run again only with `--again`.

**Data.** Synthetic people in the formats of the three datasets, for each seed anew. For training {people.coco_train:,} of
COCO's, {people.aic_train:,} of AIC's and {people.mpii_train:,} of MPII's, about the paper's proportions; for evaluation
{people.coco_val:,} of COCO's.

**Model.** Input {size[0]}x{size[1]}, {grid[0]} x {grid[1]} tokens of width {backbone.width}, {backbone.depth} blocks, heatmaps
of {heatmaps[0]}x{heatmaps[1]}. The teacher is {teacher.width} wide.

**Budget.** All rows of a table take the same number of steps of the same batch, whatever a step costs. Steps, not seconds,
end a run, so that its result does not depend on what else the machine does. They are sized so that a run's own process,
from imports to evaluation, takes at most 90 seconds on 2 idle cores; shared stages are timed on their own. Settings were
chosen by the base run's AP and by time alone, before any comparison was looked at. The shared stages:

| stage | steps | batch | people seen |
| --- | --- | --- | --- |
{budgets}

**Evaluation.** COCO's AP on the seed's evaluation people, with annotated boxes and the flip test, of the last weights. No
weights were chosen on these people.

**Statistics.** A seed draws people, initialisation, order, augmentation and masks. Two rows of one seed share all of it,
so the gap is the mean over {len(miniature.seeds)} seeds of paired differences, and its 95 % interval is Student's with
{len(miniature.seeds) - 1} degrees of freedom. It is never taken narrower than a paired bootstrap over the images
({RESAMPLES} resamples a seed) would have it. *Smallest gap* is half the interval's width: with the spread that was seen, a
smaller gap could not have been told from none. A row **holds** if the whole interval lies on the paper's side of zero, is
**reversed** if all of it lies on the other, else **inconclusive**. The intervals are not widened for the number of rows.
"""
