"use strict";
// The slider of the walks. Without this script, and in print, all steps are shown side by side.
const walks = document.querySelector(".walks");
if (walks) {
  const slider = walks.querySelector(".slider");
  const input = slider.querySelector("input");
  const output = slider.querySelector("output");
  const rows = [...walks.querySelectorAll(".walk")].map((row) => ({
    now: row.querySelector(".now"),
    frames: [...row.querySelectorAll(".frame")],
  }));
  const show = () => {
    const step = Number(input.value);
    const most = Number(input.max);
    const told = `step ${step + 1} of ${most + 1}, t = ${(step / most).toFixed(2)}`;
    input.setAttribute("aria-valuetext", told);
    output.textContent = told;
    for (const { now, frames } of rows) {
      now.src = frames[step].src;
      now.alt = frames[step].alt;
      frames.forEach((frame, place) => frame.classList.toggle("shown", place === step));
    }
  };
  slider.hidden = false;
  rows.forEach(({ now }) => { now.hidden = false; });
  input.addEventListener("input", show);
  show();
}
