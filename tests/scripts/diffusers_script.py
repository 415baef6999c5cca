"""Trains a small U-Net as the scripts of diffusers do; it knows nothing of MiCS."""

import os

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

accelerator = Accelerator(gradient_accumulation_steps=3)
set_seed(5)
unet = UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)
schedule = DDPMScheduler(num_train_timesteps=10)


def save_model_hook(models, weights, output_dir):
    if accelerator.is_main_process:
        for model in models:
            model.save_pretrained(os.path.join(output_dir, "unet"))
            weights.pop()


def load_model_hook(models, input_dir):
    for _ in range(len(models)):
        model = models.pop()
        load_model = UNet2DModel.from_pretrained(input_dir, subfolder="unet")
        model.register_to_config(**load_model.config)
        model.load_state_dict(load_model.state_dict())
        del load_model


accelerator.register_save_state_pre_hook(save_model_hook)
accelerator.register_load_state_pre_hook(load_model_hook)
images = torch.randn(48, 1, 8, 8)
loader = torch.utils.data.DataLoader(images, batch_size=2)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
losses = []


def train():
    for batch in loader:
        with accelerator.accumulate(unet):
            noise = batch.flip(-1)
            steps = (batch[:, 0, 0, 0].abs() * 3).long().clamp(max=9)
            loss = F.mse_loss(unet(schedule.add_noise(batch, noise, steps), steps, return_dict=False)[0], noise)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())


train()
accelerator.save_state("state")
train()
accelerator.load_state("state")
del losses[6:]
train()
accelerator.unwrap_model(unet).save_pretrained("unet", is_main_process=accelerator.is_main_process)
DDPMPipeline(unet=accelerator.unwrap_model(unet), scheduler=schedule).save_pretrained("pipeline")
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    for folder in ("unet", "pipeline/unet"):
        read = UNet2DModel.from_pretrained(folder)
        losses.append(sum(param.abs().sum().item() for param in read.parameters()))
    print("LOSSES", *losses, flush=True)
