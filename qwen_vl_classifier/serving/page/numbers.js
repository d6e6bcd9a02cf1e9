// How the pages write numbers.

const MINUS = "\u2212";

export const counted = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

export const signed = (value, digits = 2) => {
  const written = Math.abs(value).toFixed(digits);
  if (Number(written) === 0) return written;
  return (value < 0 ? MINUS : "+") + written;
};
