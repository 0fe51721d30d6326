"""Fine-tuning of vision transformers: data, methods to compare, a training loop that can be interrupted, a command.

    from efft_kernels.finetune.loop import train
    from efft_kernels.finetune.settings import Settings

    result = train(Settings(data="photos/", out="runs/photos", checkpoint="ViT-B_16.npz"))

The command is ``efft-finetune``. The extra ``efft_kernels[finetune]`` installs the packages that it needs.
"""
