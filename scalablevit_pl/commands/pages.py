"""What `--help` shows: pages of 80 columns with the options that people use."""

HELP = """\
usage: scalablevit COMMAND [OPTIONS]

Train, evaluate and use ScalableViT image classifiers.

commands:
  fit        train a network as a recipe says
  doctor     look at all that a fit needs, before it begins
  validate   evaluate a run on its validation images
  test       evaluate a run on its test images, with tables and pictures
  predict    classify images
  plot       lay the curves of runs over each other
  profile    measure what networks, or the loading of data, cost
  export     make a folder of a run's weights that can be used and shared
  convert    make such a folder of a checkpoint of the authors' release
  push       upload such a folder to the Hugging Face Hub
  pull       download such a folder
  info       show what is in such a folder, here or on the Hub

options:
  --help     show this page; after a command, the page of that command
  --version  show the version

examples:
  scalablevit fit --config recipes/quickstart.yaml --run first
  scalablevit test --run first
  scalablevit predict --weights runs/first photo.jpg more_photos/ --out out.csv
  scalablevit export runs/first first_model
"""

FIT_HELP = """\
usage: scalablevit fit --config RECIPE [--config MORE] [OPTIONS]

Train a network as a recipe says. Later files and options win over earlier ones.

  --config FILE              a recipe, such as recipes/quickstart.yaml: a path,
                             or one of those that come with the package
  --run NAME                 folder runs/NAME for all that the run leaves
                             (default: the recipe's name, date and time)
  --resume auto|last|FILE    go on from a checkpoint of the run (auto: from the
                             newest whole one, or begin if there is none)
  --weights RUN|FILE|FOLDER|OWNER/NAME[@REVISION]   start from trained weights
                             (from other classes: with a new last layer)
  --seed_everything INT      seed of all random numbers

data
  --data.dataset NAME        id on the Hugging Face Hub, a folder (parquet, or
                             one folder per class), or fashion_mnist_sample
  --data.image_column NAME   where there is not exactly one of type Image
  --data.label_column NAME   where there is not exactly one of type ClassLabel
  --data.val_split NAME      default: validation, or else a tenth of train
  --data.batch_size INT      samples of a batch on each process
  --data.num_workers INT     loader processes of each process
  --data.streaming BOOL      read training images as they come (parquet)
  --data.max_unreadable INT  damaged images to put up with on each process
  --data.repeats INT         of an image in an epoch, augmented anew each time
  --data.preprocessing.input_size INT     side of the network's input in pixels
  --data.augmentation.auto_augment NAME   such as rand-m9-mstd0.5-inc1, or null
  --data.augmentation.mixup FLOAT, --data.augmentation.cutmix FLOAT

network and optimization
  --model.network.name NAME             scalablevit_nano, _s, _b, _l
  --model.network.num_classes INT       must be that of the data
  --model.network.drop_path_rate FLOAT  stochastic depth
  --model.optimizer.lr FLOAT            learning rate at base_batch_size
  --model.base_batch_size INT|null      global batch that the rate is meant for
  --model.label_smoothing FLOAT
  --model.freeze backbone|features|LIST  what is not trained: modules by name,
                                        or all features (a linear probe)
  --model.layer_decay FLOAT             of the learning rate, layer by layer
  --model.grad_checkpointing BOOL       less memory, more time
  --model.compile BOOL, --model.channels_last BOOL
  --ema.decay FLOAT                     average the weights, as with 0.9999

trainer (Lightning's, all of its options)
  --trainer.max_epochs INT
  --trainer.accelerator auto|cpu|gpu    --trainer.devices INT
  --trainer.num_nodes INT               --trainer.strategy auto|ddp
  --trainer.precision 32-true|bf16-mixed|16-mixed
  --trainer.accumulate_grad_batches INT
  --checkpoint.every_minutes FLOAT      within an epoch (default: 30)

  --print_config   show the resolved configuration and stop
  --traceback      show where an error came from
  --help-all       show every option
"""

DOCTOR_HELP = """\
usage: scalablevit doctor --config RECIPE [--config MORE] [OPTIONS]

Look at all that a fit needs, before it begins, and say what to do about what is
found. It takes the options of fit (scalablevit fit --help) and means the same
by them: what is looked at is the fit that would run on this machine. It leaves
no run behind.

  --images INT     images of each part to decode (default: 200)
  --seconds FLOAT  how long to measure the training step, and then the loader
                   (default: 5)
  --download       fetch data that lie on the Hub, as a fit would, and look at
                   them; else only those in the cache are looked at
  --traceback      show where errors came from, and go on
  --help-all       show every option of fit

what is looked at
  versions; the configuration; the run folder: whether it is free and can be
  written, and whether checkpoints fit on its disk; devices and precision; for
  data on the Hub token, terms, revision and size; space for the data; splits,
  classes, and classes without images; images that cannot be read; processor
  cores and shared memory; batch, learning rate and steps as they come out; the
  speed of the training step and of the data, and the memory it takes

Each row begins with ok, with warn for what a run can live with, or with FAIL
for what it cannot. The exit status is 0 without a FAIL, 1 with one, and 2 if
the command itself is wrong.

examples:
  scalablevit doctor --config recipes/quickstart.yaml
  scalablevit doctor --config recipes/imagenet_scalablevit_s.yaml --download
"""

EVALUATE_HELP = """\
usage: scalablevit {command} --run RUN [OPTIONS]

{purpose}

  --run NAME                 a run: a name below runs/, or a path; its
                             config.yaml is used unless --config is given, and
                             the results are written into it
  --ckpt_path best|last|FILE weights (default: the run's best, or else its last)
{average}  --weights FOLDER|OWNER/NAME[@REVISION]    weights of a model instead
  --config FILE              a recipe instead of the run's own configuration
  --data.batch_size INT      samples of a batch on each process
  --data.num_workers INT     loader processes of each process
  --trainer.accelerator auto|cpu|gpu    --trainer.devices INT
  --print_config   show the resolved configuration and stop
  --traceback      show where an error came from
  --help-all       show every option
"""

PREDICT_HELP = """\
usage: scalablevit predict --weights WEIGHTS IMAGE|FOLDER ... [OPTIONS]
       scalablevit predict --run RUN [OPTIONS]

Classify image files, or the test images of a run's data set (into its
predictions.csv). A row gives index, path, and the five most probable classes.

image files
  --weights WEIGHTS          a run folder (its best weights), a checkpoint, a
                             model's folder, or OWNER/NAME[@REVISION] on the Hub
  --average ema|none         averaged or raw weights (default: averaged if any)
  --out FILE                 the CSV to write (default: to the screen)
  --batch_size INT           images at a time (default: 32)
  --num_workers INT          loader processes (default: 2)
  --accelerator auto|cpu|gpu

test images of a run
  --run NAME                 a run: a name below runs/, or a path
  --ckpt_path best|last|FILE weights (default: the run's best, or else its last)

  --traceback      show where an error came from
  --help-all       show every option of the second form
"""

EXPORT_HELP = """\
usage: scalablevit export RUN|CHECKPOINT FOLDER [OPTIONS]

Make a folder of trained weights that can be used and shared: model.safetensors,
config.json, and README.md, the model's card, with the run's recipe and results.

  --average ema|none   averaged or raw weights (default: averaged if there are)
  --license NAME       licence for the card, such as apache-2.0
  --overwrite          replace a model that is in the folder
  --traceback          show where an error came from
"""

CONVERT_HELP = """\
usage: scalablevit convert REFERENCE.pth FOLDER --model NAME|CONFIG [OPTIONS]

Make a model's folder of a checkpoint of the authors' release, without running
any code that may be in it.

  --model NAME|FILE    scalablevit_s, _b, _l, or a JSON file with arguments of
                       ScalableViT: the numbers of heads are not in checkpoints
  --overwrite          replace a model that is in the folder
  --traceback          show where an error came from
"""

PUSH_HELP = """\
usage: scalablevit push FOLDER OWNER/NAME [OPTIONS]

Upload a model's folder to the Hugging Face Hub as one commit, after checking
the folder, its card and licence, and the token. To repeat it is safe.

  --private            make the repository private, if it has to be made
  --revision BRANCH    branch to push to (default: main)
  --license NAME       licence in the place of the card's, such as apache-2.0
  --dry-run            check everything, show what would be done, do nothing
  --traceback          show where an error came from
"""

PULL_HELP = """\
usage: scalablevit pull OWNER/NAME FOLDER [OPTIONS]

Download a model from the Hugging Face Hub: all files of one commit, each with
its checksum compared. The folder appears when it is complete.

  --revision REVISION  branch, tag or commit (default: the main branch)
  --overwrite          replace a model that is in the folder
  --traceback          show where an error came from
"""

INFO_HELP = """\
usage: scalablevit info FOLDER|OWNER/NAME [OPTIONS]

Show what is in a model's folder, here or on the Hugging Face Hub: the network,
its cost, labels, metrics, commit and checksum. Weights are not downloaded.

  --revision REVISION  branch, tag or commit (default: the main branch)
  --traceback          show where an error came from
"""

PLOT_HELP = """\
usage: scalablevit plot RUN [RUN ...] [OPTIONS]

Lay the curves of up to eight runs over each other, loss and top-1 by epoch, and
print a table: epochs done, best top-1 and its epoch (of averaged weights, too),
best top-5, last training loss, images per second.

  RUN                  a run: a name below runs/, or a path
  --out FILE           the picture to write (default: comparison.png)
  --traceback          show where an error came from
"""

PROFILE_HELP = """\
usage: scalablevit profile MODEL [MODEL ...] [OPTIONS]
       scalablevit profile data --config RECIPE [OPTIONS]

Measure what networks cost, in one run and in turns: parameters, multiply-adds,
images/s and latency with their spread, peak memory, and the part of the pace of
the device's own matrix products that is reached.

  MODEL                  scalablevit_nano, _s, _b, _l; any name of timm's; the
                         folder (with a / in it) or OWNER/NAME of one of ours
  --batch-size INTS      such as 1,8,32 (default: 1,8; on a GPU 1,128); at 1 the
                         time is the latency, each answer being waited for
  --input-size SIZES     sides in pixels or HEIGHTxWIDTH, as in 224,800x1333
                         (default: 224)
  --precision LIST       of 32, bf16, fp16; fp16: GPUs only (default: 32)
  --mode LIST            of inference, train (a whole step; default: inference)
  --compile LIST         of false, true (default: false)
  --fuse LIST            of false, true: inference on a CPU with model.fuse()
                         (default: false)
  --channels-last        lay images and convolutions out channels-last
  --grad-checkpointing   compute activations again in training steps
  --device auto|cpu|cuda (default: auto, a GPU if there is one)
  --threads INT          of a CPU (default: torch's own choice)
  --repeats INT          rounds; each measures every case (default: 10)
  --seconds FLOAT        least time of a measurement (default: 0.1)
  --warmup INT           steps of each case before (default: 3)
  --json FILE|-          write all samples, versions and conventions; with -
                         to the screen, in the table's place
  --plot FILE            a picture (.png): throughput by batch, and published
                         accuracy by throughput

data: the train loader of a fit, against torchvision's ImageFolder with timm's
transform, and what each stage of it takes; options of fit, and
  --workers INTS         loader processes (default: 0,1,2)
  --seconds FLOAT        how long each is watched in a round (default: 5)
  --rounds INT           how often each is measured (default: 5)
  --images INT           images to measure with (default: 1024)
  --json FILE|-          as above

  --traceback            show where an error came from

examples:
  scalablevit profile scalablevit_s swin_tiny_patch4_window7_224 twins_svt_small
  scalablevit profile scalablevit_s scalablevit_b --mode train \\
      --precision bf16 --batch-size 32,64,128 --compile false,true --plot x.png
  scalablevit profile data --config recipes/quickstart.yaml
"""

AVERAGE = "  --average ema|none         averaged or raw weights (default: averaged if any)\n"

PURPOSES = {
    "validate": "Evaluate a run on its validation images; writes val.json.",
    "test": "Evaluate a run on its test images; writes test.json, predictions.csv,\npredictions.png and confusion.png.",
}

PAGES = {
    "fit": FIT_HELP,
    "doctor": DOCTOR_HELP,
    "predict": PREDICT_HELP,
    "plot": PLOT_HELP,
    "profile": PROFILE_HELP,
    "export": EXPORT_HELP,
    "convert": CONVERT_HELP,
    "push": PUSH_HELP,
    "pull": PULL_HELP,
    "info": INFO_HELP,
}


def help_page(command: str) -> str:
    """Return the page of the options that people use."""
    average = AVERAGE if command == "test" else ""
    return PAGES.get(command) or EVALUATE_HELP.format(command=command, purpose=PURPOSES[command], average=average)
