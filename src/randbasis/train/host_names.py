"""The names of transformers' Trainer that training overrides, checked when training is first imported.

See :mod:`randbasis.tuner.host_names`.
"""

from randbasis.tuner.host_names import HostName

_TRAINER = "transformers.trainer"
_CALLBACKS = "transformers.trainer_callback"

TRAINER_NAMES = (
    HostName(_TRAINER, "Trainer._get_num_items_in_batch", "rows of a step do not weigh the same", ("batch_samples",)),
    HostName(_TRAINER, "Trainer._get_train_sampler", "a resumed run meets other batches than the run before"),
    HostName(_TRAINER, "Trainer._load_best_model", "the last parameters are saved instead of the best"),
    HostName(_TRAINER, "Trainer._load_from_checkpoint", "a run is resumed with fresh coefficients"),
    HostName(_TRAINER, "Trainer._save", "a checkpoint holds the whole base model", ("output_dir", "state_dict")),
    HostName(_TRAINER, "Trainer._save_checkpoint", "coefficients that are not finite are kept", ("model", "trial")),
    HostName(
        _TRAINER,
        "Trainer.compute_loss",
        "rows of a step do not weigh the same",
        ("model", "inputs", "return_outputs", "num_items_in_batch"),
    ),
    HostName(_TRAINER, "Trainer.create_optimizer", "adapter and head have one learning rate"),
    HostName(
        _TRAINER, "Trainer.create_scheduler", "the first step learns nothing", ("num_training_steps", "optimizer")
    ),
    HostName(
        _TRAINER,
        "Trainer.evaluation_loop",
        "scores are means of means of batches",
        ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"),
    ),
    HostName(_TRAINER, "Trainer.get_train_dataloader", "several processes learn other rows than one"),
    HostName(
        _TRAINER,
        "Trainer.save_model",
        "processes wait for ever for one that could not write",
        ("output_dir", "_internal_call"),
    ),
    HostName(_TRAINER, "Trainer.training_step", "a loss that is not finite does not end the run"),
    HostName(_CALLBACKS, "TrainerCallback.on_evaluate", "progress does not show the scores"),
    HostName(_CALLBACKS, "TrainerCallback.on_log", "progress does not show the loss"),
    HostName(_CALLBACKS, "TrainerCallback.on_step_end", "the last step is not evaluated"),
    HostName(_CALLBACKS, "TrainerCallback.on_train_begin", "no progress is shown"),
    HostName(_CALLBACKS, "TrainerCallback.on_train_end", "the progress bar is not closed"),
    HostName("transformers.models.auto.image_processing_auto", "AutoImageProcessor", "images"),
    HostName("transformers", "EarlyStoppingCallback", "early_stop"),
    HostName("transformers.training_args", "OptimizerNames", "optimizer"),
    HostName("transformers.training_args", "TrainingArguments._setup_devices", "device"),
    HostName("transformers.integrations.integration_utils", "TensorBoardCallback", "report_to"),
    HostName("transformers.integrations.integration_utils", "get_reporting_integration_callbacks", "report_to"),
    HostName("transformers.integrations.integration_utils", "get_available_reporting_integrations", "report_to"),
    HostName("transformers.integrations.bitsandbytes", "validate_bnb_backend_availability", "load_in_4bit"),
    HostName("transformers.quantizers.base", "get_keys_to_not_convert", "load_in_4bit"),
    HostName("transformers", "PrinterCallback", "metrics are printed into the answers of the command"),
    HostName("accelerate.data_loader", "prepare_data_loader", "several processes", ("num_processes", "process_index")),
    HostName("accelerate", "PartialState", "several processes", ("cpu",)),
)
"""What training overrides or reaches into."""
