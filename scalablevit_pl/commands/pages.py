"""The pages of `--help`: 80 columns with the options that people use. Tests compare them with the parsers."""

HELP = """\
usage: scalablevit COMMAND [OPTIONS]

Train, evaluate and use ScalableViT networks.

commands:
  fit        train a network with a recipe
  doctor     check everything a fit needs, before it starts
  validate   evaluate a run on its validation images
  test       evaluate a run on its test images, with tables and pictures
  predict    run a network on images
  plot       compare the curves of runs in one picture
  profile    measure the cost of networks, or of loading data
  export     write a run's weights to a folder, for use and sharing
  convert    write such a folder from a checkpoint of the authors' release
  push       upload such a folder to the Hugging Face Hub
  pull       download such a folder
  info       show what such a folder holds, here or on the Hub

options:
  --help       show this page; after a command, the page of that command
  --traceback  after a command: show where an error came from
  --version    show the version

examples:
  scalablevit fit --config recipes/quickstart.yaml --run first
  scalablevit test --run first
  scalablevit predict --weights runs/first photo.jpg more_photos/ --out out.csv
  scalablevit export runs/first first_model
"""

EVALUATION = """\
usage: scalablevit {command} --run RUN [OPTIONS]

{purpose}

  --run NAME                 a run: a name below runs/, or a path; its
                             config.yaml is used unless --config is given, and
                             the results are written into it
  --ckpt_path best|last|FILE weights (default: best, or else last)
{average}  --weights FOLDER|OWNER/NAME[@REVISION]    weights of a model instead
  --config FILE              a recipe instead of the run's own configuration
  --data.batch_size INT      samples per batch on each process
  --data.num_workers INT     loader processes of each process
  --trainer.accelerator auto|cpu|gpu    --trainer.devices INT
  --print_config   show the resolved configuration and exit
  --help-all       show every option
"""

PAGES = {
    "fit": """\
usage: scalablevit fit --config RECIPE [--config MORE] [OPTIONS]

Train a network with a recipe. Later files override earlier ones, and options
override files.

  --config FILE              a recipe, such as recipes/quickstart.yaml: a path,
                             or one that comes with the package
  --run NAME                 folder runs/NAME for everything the run writes
                             (default: the recipe's name, date and time)
  --resume auto|last|FILE    resume from a checkpoint of the run (auto: from the
                             newest intact one; without any, start)
  --weights RUN|FILE|FOLDER|OWNER/NAME[@REVISION]   start from trained weights
                             (for other classes: with a new last layer)
  --seed_everything INT      seed of all random numbers

data
  --data.dataset NAME        id on the Hugging Face Hub, a folder (parquet, or
                             one folder per class), or fashion_mnist_sample
  --data.image_column NAME   needed unless exactly one has type Image
  --data.label_column NAME   needed unless exactly one has type ClassLabel
  --data.val_split NAME      default: validation, or else a tenth of train
  --data.batch_size INT      samples per batch on each process
  --data.num_workers INT     loader processes of each process
  --data.streaming BOOL      read training images sequentially (parquet)
  --data.max_unreadable INT  unreadable images to tolerate on each process
  --data.repeats INT         times an image occurs, augmented anew, in an epoch
  --data.preprocessing.input_size INT     side of the network's input in pixels
  --data.augmentation.auto_augment NAME   such as rand-m9-mstd0.5-inc1, or null
  --data.augmentation.mixup FLOAT, --data.augmentation.cutmix FLOAT

network and optimization
  --model.network.name NAME             scalablevit_nano, _s, _b, _l
  --model.network.num_classes INT       must be that of the data
  --model.network.drop_path_rate FLOAT  stochastic depth
  --model.optimizer.lr FLOAT            learning rate at base_batch_size
  --model.base_batch_size INT|null      global batch for which the rate is given
  --model.label_smoothing FLOAT
  --model.freeze backbone|features|LIST  modules that are not trained, by name;
                                        features: all but the last layer
  --model.layer_decay FLOAT             of the learning rate, layer by layer
  --model.grad_checkpointing BOOL       less memory, more time
  --model.compile BOOL, --model.channels_last BOOL
  --ema.decay FLOAT                     average the weights, as with 0.9999

trainer (all of Lightning's options)
  --trainer.max_epochs INT
  --trainer.accelerator auto|cpu|gpu    --trainer.devices INT
  --trainer.num_nodes INT               --trainer.strategy auto|ddp
  --trainer.precision 32-true|bf16-mixed|16-mixed
  --trainer.accumulate_grad_batches INT
  --checkpoint.every_minutes FLOAT      within an epoch (default: 30)

  --print_config   show the resolved configuration and exit
  --help-all       show every option
""",
    "doctor": """\
usage: scalablevit doctor --config RECIPE [--config MORE] [OPTIONS]

Check everything a fit needs on this machine, before it starts, and suggest a
fix for each problem. Takes the options of fit (scalablevit fit --help) and
leaves no run behind.

  --images INT     images of each split to decode (default: 200)
  --seconds FLOAT  how long to measure the training step, and then the loader
                   (default: 5)
  --download       download data from the Hub and check them; without it, only
                   data in the cache are checked
  --traceback      show where errors came from, and continue
  --help-all       show every option of fit

The checks cover versions, configuration, run folder, devices and precision,
token and terms on the Hub, disk space, classes, unreadable images, processor
cores, shared memory, the resulting batch, learning rate and steps, and speed
and memory of the training step and of the data.

Each row begins with ok, with warn for a problem the run can tolerate, or with
FAIL. The exit status is 0 without a FAIL, 1 with one, and 2 if the command
itself is wrong.

examples:
  scalablevit doctor --config recipes/quickstart.yaml
  scalablevit doctor --config recipes/imagenet_scalablevit_s.yaml --download
""",
    "validate": EVALUATION.format(
        command="validate", purpose="Evaluate a run on its validation images; writes val.json.", average=""
    ),
    "test": EVALUATION.format(
        command="test",
        purpose="Evaluate a run on its test images; writes test.json, predictions and pictures.",
        average="  --average ema|none         averaged or raw weights (default: averaged if any)\n",
    ),
    "predict": """\
usage: scalablevit predict --weights WEIGHTS IMAGE|FOLDER ... [OPTIONS]
       scalablevit predict --run RUN [OPTIONS]

Run a network on image files, or on the test images of a run's data set (into
its predictions.csv). A classifier's row has index, path, and the five most
probable classes.

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
  --ckpt_path best|last|FILE weights (default: best, or else last)

  --help-all       show every option of the second form
""",
    "plot": """\
usage: scalablevit plot RUN [RUN ...] [OPTIONS]

Draw the curves of up to eight runs in one picture, by epoch, and print a table
of their best metrics, last training loss and images per second.

  RUN                  a run: a name below runs/, or a path
  --out FILE           the picture to write (default: comparison.png)
""",
    "profile": """\
usage: scalablevit profile MODEL [MODEL ...] [OPTIONS]
       scalablevit profile data --config RECIPE [OPTIONS]

Measure networks in one run, interleaved: parameters, multiply-adds, images/s
and latency with their spread, peak memory, and throughput relative to that of
the device's own matrix products.

  MODEL                  scalablevit_nano, _s, _b, _l; any timm name; a model's
                         folder (written with a /) or OWNER/NAME on the Hub
  --batch-size INTS      such as 1,8,32 (default: 1,8; on a GPU 1,128); 1
                         measures the latency of single images
  --input-size SIZES     sides in pixels or HEIGHTxWIDTH, as in 224,800x1333
                         (default: 224)
  --precision LIST       of 32, bf16, fp16; fp16: GPUs only (default: 32)
  --mode LIST            of inference, train (a whole step; default: inference)
  --compile LIST         of false, true (default: false)
  --fuse LIST            of false, true: fused inference on a CPU
                         (default: false)
  --channels-last        use the channels-last memory format
  --grad-checkpointing   recompute activations in training steps
  --device auto|cpu|cuda (default: auto, a GPU if there is one)
  --threads INT          of a CPU (default: torch's own choice)
  --repeats INT          rounds; each measures every case (default: 10)
  --seconds FLOAT        shortest time of a measurement (default: 0.1)
  --warmup INT           steps of each case before (default: 3)
  --json FILE|-          write all samples, versions and conventions; -: to the
                         screen, instead of the table
  --plot FILE            a picture (.png): throughput by batch, and published
                         accuracy by throughput

data: compare the train loader of a fit with torchvision's ImageFolder and
timm's transform, and time its stages; options of fit, and
  --workers INTS         loader processes (default: 0,1,2)
  --seconds FLOAT        time of each in a round (default: 5)
  --rounds INT           measurements of each (default: 5)
  --images INT           images to measure with (default: 1024)
  --json FILE|-          as above

examples:
  scalablevit profile scalablevit_s swin_tiny_patch4_window7_224 twins_svt_small
  scalablevit profile scalablevit_s scalablevit_b --mode train \\
      --precision bf16 --batch-size 32,64,128 --compile false,true --plot x.png
  scalablevit profile data --config recipes/quickstart.yaml
""",
    "export": """\
usage: scalablevit export RUN|CHECKPOINT FOLDER [OPTIONS]

Write trained weights to a folder, for use and sharing: model.safetensors,
config.json, and README.md, the model card with the run's recipe and results.

  --average ema|none   averaged or raw weights (default: averaged if any)
  --license NAME       license for the card, such as apache-2.0
  --overwrite          replace the model in the folder
""",
    "convert": """\
usage: scalablevit convert REFERENCE.pth FOLDER --model NAME|CONFIG [OPTIONS]

Write a model's folder from a checkpoint of the authors' release. Code in the
checkpoint is not run.

  --model NAME|FILE    scalablevit_s, _b, _l, or a JSON file with arguments of
                       ScalableViT: checkpoints lack the numbers of heads
  --overwrite          replace the model in the folder
""",
    "push": """\
usage: scalablevit push FOLDER OWNER/NAME [OPTIONS]

Upload a model's folder to the Hugging Face Hub in one commit, after checking
the folder, its card and license, and the token. Repeating it is safe.

  --private            make the repository private if it is new
  --revision BRANCH    branch to push to (default: main)
  --license NAME       license instead of the card's, such as apache-2.0
  --dry-run            check everything, show what would be done, do nothing
""",
    "pull": """\
usage: scalablevit pull OWNER/NAME FOLDER [OPTIONS]

Download a model from the Hugging Face Hub: all files of one commit, with their
checksums verified. The folder appears when it is complete.

  --revision REVISION  branch, tag or commit (default: the main branch)
  --overwrite          replace the model in the folder
""",
    "info": """\
usage: scalablevit info FOLDER|OWNER/NAME [OPTIONS]

Show a model's folder, here or on the Hugging Face Hub: the network, its cost,
labels, metrics, commit and checksum. Weights are not downloaded.

  --revision REVISION  branch, tag or commit (default: the main branch)
""",
}
