// A voice is what answers: the base model ([]), one adapter, or a weighted mix of several.

const HUES = [168, 24, 262, 340, 205, 88, 300, 48];

export const MOST_ADAPTERS = 8;

// The same adapter has the same colour everywhere and after every reload.
export function hueOf(id) {
  let sum = 0;
  for (const char of id) sum = (sum * 31 + char.codePointAt(0)) >>> 0;
  return HUES[sum % HUES.length];
}

export function nameOf(voice) {
  if (voice.length === 0) return "Base model";
  if (voice.length === 1 && voice[0].weight === 1) return voice[0].id;
  return voice.map(({ id, weight }) => `${id} ${weight.toFixed(2)}`).join(" + ");
}

// A thin band with a stretch of colour for each adapter, as long as its share of the weight.
export function ribbon(voice) {
  const band = document.createElement("span");
  band.className = "ribbon";
  band.setAttribute("aria-hidden", "true");
  for (const { id, weight } of voice) {
    const part = document.createElement("span");
    part.style.setProperty("--hue", hueOf(id));
    part.style.flexGrow = Math.max(Math.abs(weight), 0.02);
    band.append(part);
  }
  return band;
}

export function voiceLabel(voice) {
  const label = document.createElement("span");
  label.className = "voice-label";
  const text = document.createElement("span");
  text.textContent = nameOf(voice);
  label.append(ribbon(voice), text);
  return label;
}

// The dialog in which a voice is put together.
export class VoicePicker {
  constructor(dialog) {
    this.dialog = dialog;
    this.list = dialog.querySelector("[data-list]");
    this.preview = dialog.querySelector("[data-preview]");
    this.heading = dialog.querySelector("h2");
    this.voice = [];
    dialog.querySelector("[data-base]").addEventListener("click", () => {
      this.onUse([]);
      dialog.close();
    });
    // not the dialog's close event: that comes later, and a question may be asked in between
    dialog.querySelector("form").addEventListener("submit", () => this.onUse(this.voice));
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
  }

  // onUse(voice): the person decided; not called if the dialog is dismissed
  choose(title, voice, adapters, onUse) {
    this.onUse = onUse;
    this.heading.textContent = title;
    this.voice = voice.map((part) => ({ ...part }));
    this.list.replaceChildren(...adapters.map((adapter) => this.row(adapter)));
    this.dialog.querySelector("[data-none]").hidden = adapters.length > 0;
    this.showPreview();
    this.dialog.showModal();
  }

  row(adapter) {
    const template = document.querySelector("#adapter-row");
    const row = template.content.firstElementChild.cloneNode(true);
    const [check, slider] = row.querySelectorAll("input");
    const part = this.voice.find(({ id }) => id === adapter.id);
    row.style.setProperty("--hue", hueOf(adapter.id));
    row.querySelector("[data-name]").textContent = adapter.id;
    row.querySelector("[data-about]").textContent = `rank ${adapter.rank} · version ${adapter.version}`;
    check.checked = Boolean(part);
    slider.value = part?.weight ?? 1;
    slider.setAttribute("aria-label", `Weight of ${adapter.id}`);
    const update = () => {
      const weight = Number(slider.value);
      row.querySelector("output").textContent = weight.toFixed(2);
      row.classList.toggle("is-on", check.checked);
      this.voice = this.voice.filter(({ id }) => id !== adapter.id);
      if (check.checked) this.voice.push({ id: adapter.id, weight });
      this.showPreview();
    };
    check.addEventListener("change", update);
    slider.addEventListener("input", () => {
      check.checked = true;
      update();
    });
    update();
    return row;
  }

  showPreview() {
    const tooMany = this.voice.length > MOST_ADAPTERS;
    this.preview.replaceChildren(voiceLabel(this.voice));
    this.dialog.querySelector("[data-too-many]").hidden = !tooMany;
    this.dialog.querySelector("[data-use]").disabled = tooMany;
  }
}
