// Answers by swiping the card on a touch screen: right for yes, left for no. Scrolling and zooming stay the browser's.
import { find } from "./dom.js";

const FAR = 0.28; // of the card's width: from here on, letting go answers
const LEAST = 70; // pixels
const SIDEWAYS = 1.2; // how much more a finger must move across than up or down
const BEGINS = 10; // pixels after which a movement is a swipe

/**
 * Watch for swipes.
 * @param {{allowed: () => boolean, names: () => {yes: string, no: string}, answer: (word: "yes"|"no") => void}} page
 */
export function watchSwipes({ allowed, names, answer }) {
  const card = find("card");
  const badge = find("badge");
  let finger = null; // where it began
  let far = 0;

  const settle = () => {
    finger = null;
    card.classList.remove("swiped");
    card.style.transform = "";
    badge.hidden = true;
  };

  card.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch") return;
    if (!event.isPrimary || !allowed() || (visualViewport?.scale ?? 1) > 1.01) {
      settle(); // a second finger: this is a zoom
      return;
    }
    finger = { id: event.pointerId, x: event.clientX, y: event.clientY, moves: false };
    far = Math.max(LEAST, FAR * card.clientWidth);
  });

  card.addEventListener("pointermove", (event) => {
    if (event.pointerId !== finger?.id) return;
    const [across, along] = [event.clientX - finger.x, event.clientY - finger.y];
    if (!finger.moves) {
      if (Math.hypot(across, along) < BEGINS) return;
      if (Math.abs(across) < SIDEWAYS * Math.abs(along)) {
        settle();
        return;
      }
      finger.moves = true;
      card.setPointerCapture(finger.id);
      card.classList.add("swiped");
    }
    const word = across > 0 ? "yes" : "no";
    card.style.transform = `translateX(${across}px) rotate(${across / 60}deg)`;
    badge.textContent = names()[word];
    badge.hidden = false;
    badge.className = `badge ${word}${Math.abs(across) >= far ? " decided" : ""}`;
    badge.style.opacity = String(Math.min(1, 0.25 + Math.abs(across) / far * 0.75));
  });

  card.addEventListener("pointerup", (event) => {
    if (event.pointerId !== finger?.id) return;
    const across = event.clientX - finger.x;
    const { moves } = finger;
    settle();
    if (!moves) return;
    // Browsers may make a click of it, which would be taken for a tap on the picture.
    const swallow = (click) => click.stopPropagation();
    card.addEventListener("click", swallow, { capture: true });
    setTimeout(() => card.removeEventListener("click", swallow, { capture: true }), 50);
    if (Math.abs(across) >= far) answer(across > 0 ? "yes" : "no");
  });
  card.addEventListener("pointercancel", settle);
}
